"""Triton forms of the ops: one fused kernel each, one launch per call, nothing that waits for the device.

The torch form beside each op says what it means; a kernel may differ from it by rounding. Importing a module of this
package imports Triton, which an installation for the CPU need not have: :mod:`lorikeet.ops.select` does so on demand.
"""
