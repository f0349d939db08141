"""What a user may set under `--additional-config '{"misa": {...}}'`, validated and completed for one model."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from misa_vllm.index_cache import INDEX_HEAD_DIM, PAGE_TOKENS
from misa_vllm.policies import POLICIES
from misa_vllm.settings import STATISTICS, IndexerSettings, MISAConfigError

POOL_BLOCK = 1024
"""Default B: the paper's release (its router pools 1024 keys)."""

CHECKPOINT_FIELDS = {
    "active_heads": "misa_topk_heads",
    "pool_block": "misa_k_block_size",
    "candidates": "misa_stage1_topk",
    "statistic": "misa_statistic",
}
"""Option -> field of a checkpoint's config.json that stands in where the option is absent; all but the last are of the
paper's release."""


class MISAOptions(BaseModel):
    """The user's options; None means "not given"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = "misa"
    """Who selects tokens, a name in `misa_vllm.policies.POLICIES`: routed heads ("misa"), routed heads re-ranked by all
    heads ("hierarchical"), all heads, exact DSA ("dsa"), or all heads inside the best blocks ("hisa", to compare)."""
    active_heads: int | None = Field(default=None, ge=1)
    """h: indexer heads that score for a query. Default 8."""
    pool_block: int | None = Field(default=None, ge=PAGE_TOKENS)
    """B: tokens whose keys are averaged for the router; a multiple of the 64-token page. Default 1024."""
    candidates: int | None = Field(default=None, ge=1)
    """C: tokens that hierarchical MISA re-ranks with all heads, and that HISA's blocks hold. Default 8192."""
    min_context: int | None = Field(default=None, ge=0)
    """Tokens a query must see before its heads are routed; below it exact DSA runs. Default: the policy's
    `default_min_context`."""
    statistic: str | None = None
    """What heads are ranked by: block means ("mean"), or the means of the keys' positive and of their negative parts
    ("mean_positive"). Policy hisa takes "mean" only."""
    exact_decode: bool = False
    """Let decode steps run exact DSA (on GPUs: stock vLLM's own kernels) and route heads in prefills only."""
    audit_every: int = Field(default=0, ge=0)
    """Compare every n-th routed query with exact DSA and export the recall; 0 is off. Costs DSA's time on those."""


def resolve_settings(options: dict[str, Any], hf_config: Any) -> IndexerSettings:
    """Validate the user's options and complete them from the model's config and the defaults.

    Args:
        options: the "misa" entry of vLLM's `additional_config`.
        hf_config: the model's Hugging Face text config.

    Raises:
        MISAConfigError: with one line that says what to change.
    """
    if not isinstance(options, dict):
        raise MISAConfigError(f'additional_config["misa"] must be an object of options, not {options!r}')
    try:
        given = MISAOptions(**options)
    except ValidationError as error:
        raise MISAConfigError(_one_line(error)) from None
    if given.policy not in POLICIES:
        raise MISAConfigError(
            f'option "policy" in additional_config["misa"] cannot be {given.policy!r}: choose {", ".join(POLICIES)}'
        )
    index_heads = getattr(hf_config, "index_n_heads", None)
    topk = getattr(hf_config, "index_topk", None)
    if not index_heads or not topk:
        architecture = (getattr(hf_config, "architectures", None) or [type(hf_config).__name__])[0]
        raise MISAConfigError(
            f"{architecture} has no DSA indexer (index_n_heads, index_topk in config.json): drop "
            "--attention-backend misa, or serve a DeepSeek-V3.2 or GLM-5 checkpoint"
        )
    head_dim = getattr(hf_config, "index_head_dim", INDEX_HEAD_DIM)
    if head_dim != INDEX_HEAD_DIM:
        raise MISAConfigError(
            f"the model's index_head_dim is {head_dim}; MISA supports {INDEX_HEAD_DIM}: use another attention backend"
        )

    def pick(option: str, default: Any) -> Any:
        value = getattr(given, option)
        if value is None:
            value = getattr(hf_config, CHECKPOINT_FIELDS.get(option, ""), None)
        return default if value is None else value

    statistic = pick("statistic", STATISTICS[0])
    if given.statistic is None and statistic not in POLICIES[given.policy].statistics and statistic in STATISTICS:
        statistic = STATISTICS[0]  # what a checkpoint prefers does not keep other policies from being compared
    if statistic not in STATISTICS:
        raise MISAConfigError(
            f'option "statistic" in additional_config["misa"] cannot be {statistic!r}: choose {" or ".join(STATISTICS)}'
        )
    candidates = pick("candidates", max(8192, topk))
    min_context = POLICIES[given.policy].default_min_context(index_heads, candidates)
    settings = IndexerSettings(
        policy=given.policy,
        index_heads=index_heads,
        topk=topk,
        active_heads=pick("active_heads", min(8, index_heads)),
        pool_block=pick("pool_block", POOL_BLOCK),
        candidates=candidates,
        min_context=pick("min_context", min_context),
        exact_decode=given.exact_decode,
        statistic=statistic,
        audit_every=given.audit_every,
        routes_heads=POLICIES[given.policy].routes_heads,
    )
    if not 1 <= settings.active_heads <= index_heads:
        raise MISAConfigError(
            f"active_heads={settings.active_heads} is out of range: the model has {index_heads} indexer heads, "
            f"choose 1 to {index_heads}"
        )
    if settings.pool_block < PAGE_TOKENS or settings.pool_block % PAGE_TOKENS:
        raise MISAConfigError(
            f"pool_block={settings.pool_block} must be a multiple of the KV page, {PAGE_TOKENS} tokens: "
            f"choose for example {max(PAGE_TOKENS, settings.pool_block // PAGE_TOKENS * PAGE_TOKENS)}"
        )
    if settings.candidates < topk:
        raise MISAConfigError(
            f"candidates={settings.candidates} is less than the {topk} tokens the model selects: choose at least {topk}"
        )
    POLICIES[settings.policy].check(settings)
    return settings


def _one_line(error: ValidationError) -> str:
    """The first complaint of pydantic as one line with the remedy."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    known = ", ".join(MISAOptions.model_fields)
    if first["type"] == "extra_forbidden":
        return f'unknown option "{name}" in additional_config["misa"]: the options are {known}'
    return f'option "{name}" in additional_config["misa"] cannot be {first["input"]!r}: {first["msg"].lower()}'
