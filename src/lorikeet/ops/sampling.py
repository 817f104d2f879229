"""Choosing tokens from logits: pure functions on tensors, one vectorised pass over rows that differ in parameters.

Nothing here keeps state, waits for a device or uses a random number generator. Functions that end in ``_``
change their first argument. All arithmetic is float32.

Shape suffixes: N rows, V vocab, K most likely tokens, E entries of a sparse (row, token) list, W words of 32 tokens
in a bitmask. A tensor without a suffix is a scalar.

Order of the steps, for callers: repetition penalty, frequency and presence penalty, bias, bans and grammar,
temperature, top-k / top-p / min-p, draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64: the golden-ratio increment and the two multipliers of its finaliser, as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

# Bits of the hash that make a uniform number. A float32 near 0 resolves all of them, which is where the draw needs
# resolution: 2^-40 lets a token of probability 1e-11 win as often as it should.
_UNIFORM_BITS = 40
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24

# Outside this range x / temperature overflows or 0 / temperature is not 0 in float32; inside it, both limits are
# already reached: only ties for the maximum survive, or all tokens are equally likely.
MIN_TEMPERATURE = 1e-30
MAX_TEMPERATURE = 1e30

# How many of the most likely tokens top-p looks at before it sorts the whole vocabulary.
_FIRST_WIDTH = 1024


def penalise_repetition_(logits_NV: Tensor, seen_NV: Tensor, penalty_N: Tensor) -> None:
    """``x / penalty if x > 0 else x * penalty`` for tokens that occur in the prompt or output.

    Source: CTRL (Keskar et al., 2019), section 4.1, with the sign rule that implementations have added since.
    """
    penalty_N1 = penalty_N.unsqueeze(1)
    penalised_NV = torch.where(logits_NV > 0, logits_NV / penalty_N1, logits_NV * penalty_N1)
    logits_NV.copy_(torch.where(seen_NV, penalised_NV, logits_NV))


def penalise_counts_(
    logits_NV: Tensor, counts_NV: Tensor, frequency_N: Tensor, presence_N: Tensor
) -> None:
    """``x -= frequency * count + presence * (count > 0)``, counts over the output tokens."""
    logits_NV.sub_(counts_NV * frequency_N.unsqueeze(1))
    logits_NV.sub_((counts_NV > 0) * presence_N.unsqueeze(1))


def add_bias_(logits_NV: Tensor, rows_E: Tensor, tokens_E: Tensor, bias_E: Tensor) -> None:
    """``x[row, token] += bias``; a (row, token) pair occurs at most once."""
    logits_NV.index_put_((rows_E, tokens_E), bias_E, accumulate=True)


def ban_(logits_NV: Tensor, rows_E: Tensor, tokens_E: Tensor) -> None:
    """``x[row, token] = -inf``."""
    banned = torch.full((), -torch.inf, dtype=logits_NV.dtype, device=logits_NV.device)
    logits_NV.index_put_((rows_E, tokens_E), banned)


def apply_bitmask_(logits_NV: Tensor, bits_NW: Tensor) -> None:
    """``x[row, t] = -inf`` where bit ``t % 32`` of int32 word ``t // 32`` is 0. W = ceil(V / 32)."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits_NW.device)
    allowed_NV = ((bits_NW.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : logits_NV.shape[1]]
    logits_NV.masked_fill_(allowed_NV == 0, -torch.inf)


def scale_temperature(logits_NV: Tensor, temperature_N: Tensor) -> Tensor:
    """``(x - max(x)) / temperature``; the maximum first, so that no temperature overflows it.

    Args:
        temperature_N: in [MIN_TEMPERATURE, MAX_TEMPERATURE].
    """
    shifted_NV = logits_NV - logits_NV.amax(dim=-1, keepdim=True)
    return shifted_NV.div_(temperature_N.unsqueeze(1))


def keep_likely_(
    scaled_NV: Tensor,
    *,
    top_k_N: Tensor | None = None,
    top_p_N: Tensor | None = None,
    min_p_N: Tensor | None = None,
    max_top_k: int | None = None,
) -> None:
    """Set tokens to -inf that top-k, top-p or min-p exclude. None: no row uses that filter.

    Each filter looks at the same distribution ``p = softmax(scaled)`` and a token must pass all of them, so their
    order does not matter (SGLang's "joint" order; Hugging Face renormalises after top-k, which makes the top-p set
    smaller when both are given):

    * top-k: the token is among the k most likely;
    * top-p: the tokens more likely than it sum to less than p, which is the smallest set that reaches p;
    * min-p: its probability is at least min_p times that of the most likely token.

    Tokens exactly as likely as the last one kept are kept as well (as Hugging Face does for top-k), which makes the
    result independent of the order in which a sort puts equal values. The most likely token always survives.

    Args:
        scaled_NV: logits after the temperature, maximum 0.
        top_k_N: int64 in [1, V]; V where a row does not use it.
        top_p_N: float32 in (0, 1]; 1 where a row does not use it.
        min_p_N: float32 in [0, 1]; 0 where a row does not use it.
        max_top_k: the largest of ``top_k_N``, known to the host; below V it turns the sort into a partial one.
    """
    vocab_size = scaled_NV.shape[1]
    least_N1 = None
    if top_p_N is not None:
        most = vocab_size if max_top_k is None else max_top_k
        least_N1 = _least_of_nucleus(scaled_NV, top_k_N, top_p_N, most)
    elif top_k_N is not None:
        sorted_NK = _most_likely(scaled_NV, vocab_size if max_top_k is None else max_top_k)
        least_N1 = sorted_NK.gather(1, top_k_N.unsqueeze(1) - 1)
    if min_p_N is not None:
        floor_N1 = min_p_N.log().unsqueeze(1)
        least_N1 = floor_N1 if least_N1 is None else torch.maximum(least_N1, floor_N1)
    if least_N1 is not None:
        scaled_NV.masked_fill_(scaled_NV < least_N1, -torch.inf)


def _most_likely(values_NV: Tensor, width: int) -> Tensor:
    """The ``width`` largest values [N, K] of each row, largest first."""
    if width < values_NV.shape[1]:
        return torch.topk(values_NV, width, dim=-1).values
    return torch.sort(values_NV, dim=-1, descending=True).values


def _least_of_nucleus(
    scaled_NV: Tensor, top_k_N: Tensor | None, top_p_N: Tensor, most: int
) -> Tensor:
    """The value [N, 1] of the least likely token that top-p (and top-k, if given) keep; at most ``most`` are kept."""
    # The maximum of scaled is 0, so the maximum of its log_softmax is minus the logarithm of the total. (Not
    # logsumexp: log_softmax's sum over a row does not depend on how many rows there are.)
    log_total_N1 = torch.log_softmax(scaled_NV, dim=-1).amax(dim=-1, keepdim=True)
    # A sum that rounds to 1 early must not cut the tail of a row that does not use top-p.
    limit_N1 = torch.where(top_p_N >= 1, torch.inf, top_p_N).unsqueeze(1)
    if not scaled_NV.is_cuda and most > 4 * _FIRST_WIDTH:
        # A whole sort of a large vocabulary is the slowest step by far and rarely needed. On a GPU it is fast, and
        # looking at the result would wait for the device.
        sorted_NK, num_kept_N1 = _nucleus(scaled_NV, top_k_N, limit_N1, log_total_N1, _FIRST_WIDTH)
        if bool((num_kept_N1 < _FIRST_WIDTH).all()):
            return sorted_NK.gather(1, num_kept_N1 - 1)
    sorted_NK, num_kept_N1 = _nucleus(scaled_NV, top_k_N, limit_N1, log_total_N1, most)
    return sorted_NK.gather(1, num_kept_N1 - 1)


def _nucleus(
    scaled_NV: Tensor, top_k_N: Tensor | None, limit_N1: Tensor, log_total_N1: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The ``width`` largest values [N, K], and how many [N, 1] of them top-p and top-k keep (at least one)."""
    sorted_NK = _most_likely(scaled_NV, width)
    mass_NK = (sorted_NK + log_total_N1).exp_().cumsum_(dim=-1)
    # The mass before token j is mass_NK[:, j - 1]; nothing is before token 0.
    num_kept_N1 = 1 + (mass_NK[:, :-1] < limit_N1).sum(dim=-1, keepdim=True)
    if top_k_N is not None:
        num_kept_N1 = torch.minimum(num_kept_N1, top_k_N.unsqueeze(1))
    return sorted_NK, num_kept_N1


def row_keys(seeds_N: Tensor, counters_N: Tensor) -> Tensor:
    """One 64-bit key per row from its seed and the number of tokens it has sampled (both int64).

    The counter-th output of the SplitMix64 stream whose own seed is the first output of stream ``seed``.
    """
    streams_N = _mix64(seeds_N + _GAMMA)
    return _mix64(streams_N + (counters_N + 1) * _GAMMA)


def gumbel_noise(keys_N: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [N, V], float32, a function of the row's key and the token id alone.

    Token t gets output t of the SplitMix64 stream of its row's key. SplitMix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014) is a counter hashed by a finaliser, so any output can be
    computed without those before it, and needs no more than wrapping 64-bit multiplication, which Triton has.
    """
    tokens_V = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=keys_N.device)
    hashed_NV = _mix64(keys_N.unsqueeze(1) + tokens_V.mul_(_GAMMA))
    high_NV = _shift_right_(hashed_NV, 64 - _UNIFORM_BITS)
    uniform_NV = high_NV.to(torch.float32).add_(0.5).mul_(2.0**-_UNIFORM_BITS)
    uniform_NV.clamp_(max=_LARGEST_BELOW_ONE)
    # -log1p(-u) is an exponential variable that keeps its relative precision at 0: the side that wins draws.
    return uniform_NV.neg_().log1p_().neg_().log_().neg_()


def draw(scaled_NV: Tensor, keys_N: Tensor) -> Tensor:
    """One token [N] per row from softmax(scaled) (unnormalised; -inf is never drawn).

    The Gumbel-max trick: the argmax of ``scaled + Gumbel noise`` is distributed as the softmax. Unlike inverting a
    cumulative sum, the choice does not hinge on the order of summation.
    """
    noise_NV = gumbel_noise(keys_N, scaled_NV.shape[1])
    return noise_NV.add_(scaled_NV).argmax(dim=-1)


def token_logprobs(
    logits_NV: Tensor, tokens_N: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of the given tokens [N], and values and ids [N, K] of the most likely, most likely first.

    Among equally likely tokens the lower id comes first, so that the first one is what greedy decoding chooses.
    K = min(num_top, V).
    """
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1, dtype=torch.float32)
    chosen_N = logprobs_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
    top_NK = _top_tokens(logprobs_NV, min(num_top, logits_NV.shape[1]))
    return chosen_N, logprobs_NV.gather(1, top_NK), top_NK


def _top_tokens(values_NV: Tensor, num_top: int) -> Tensor:
    """Ids [N, K] of the largest values; ties by lower id.

    topk leaves the order of equal values open (and bfloat16 models have many), so it gets keys without ties:
    the float's bits as an ordered integer above, the id below.
    """
    vocab_size = values_NV.shape[1]
    if num_top == 0:
        return values_NV.new_empty((values_NV.shape[0], 0), dtype=torch.int64)
    bits_NV = (values_NV + 0.0).view(
        torch.int32
    )  # + 0.0 turns -0.0, equal to 0.0 but below it in bits, into 0.0
    ordered_NV = bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)
    reversed_ids_V = torch.arange(
        vocab_size - 1, -1, -1, dtype=torch.int64, device=values_NV.device
    )
    keys_NV = (ordered_NV.to(torch.int64) << 32) + reversed_ids_V
    top_keys_NK = torch.topk(keys_NV, num_top, dim=-1).values
    return (vocab_size - 1) - (top_keys_NK & 0xFFFFFFFF)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Stafford's variant 13 of MurmurHash3's), elementwise on int64."""
    x = (x ^ _shift_right_(x.clone(), 30)).mul_(_MIX_1)
    x = x.bitwise_xor_(_shift_right_(x.clone(), 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift_right_(x.clone(), 31))


def _shift_right_(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right in place: torch's is arithmetic, so the sign bits that come in are masked off."""
    return x.bitwise_right_shift_(bits).bitwise_and_((1 << (64 - bits)) - 1)
