"""The building blocks of a decoder, sharded over the ranks of a tensor-parallel group."""
