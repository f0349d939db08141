"""Who selects the tokens a query attends to. One policy is one file here and one line in `POLICIES`."""

from misa_vllm.policies.base import IndexerStep, Policy
from misa_vllm.policies.dsa import DSA
from misa_vllm.policies.hierarchical import HierarchicalMISA
from misa_vllm.policies.hisa import HISA
from misa_vllm.policies.misa import MISA
from misa_vllm.settings import IndexerSettings

POLICIES: dict[str, type[Policy]] = {"misa": MISA, "hierarchical": HierarchicalMISA, "dsa": DSA, "hisa": HISA}


def make_policy(settings: IndexerSettings) -> Policy:
    """The policy that `settings.policy` names."""
    return POLICIES[settings.policy](settings)


__all__ = ["POLICIES", "IndexerStep", "Policy", "make_policy"]
