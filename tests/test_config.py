"""Options: defaults, the checkpoint's own fields, and one clear line for everything that cannot be served."""

from types import SimpleNamespace

import pytest

from misa_vllm.config import resolve_settings
from misa_vllm.policies import POLICIES
from misa_vllm.settings import MISAConfigError

V32 = {"architectures": ["DeepseekV32ForCausalLM"], "index_n_heads": 64, "index_topk": 2048, "index_head_dim": 128}


def model(**fields):
    return SimpleNamespace(**{**V32, **fields})


def test_defaults_are_the_papers():
    settings = resolve_settings({}, model())
    assert (settings.policy, settings.active_heads, settings.pool_block, settings.candidates) == ("misa", 8, 1024, 8192)
    assert (settings.index_heads, settings.topk) == (64, 2048)


def test_checkpoint_fields_stand_in_for_absent_options():
    hf = model(misa_topk_heads=4, misa_k_block_size=128, misa_stage1_topk=4096)
    settings = resolve_settings({"active_heads": 16}, hf)
    assert (settings.active_heads, settings.pool_block, settings.candidates) == (16, 128, 4096)


def test_a_checkpoint_may_name_the_statistic():
    hf = model(misa_statistic="mean_positive")
    policies = ("misa", "hierarchical", "hisa")
    statistics = {policy: resolve_settings({"policy": policy}, hf).statistic for policy in policies}
    assert statistics == {"misa": "mean_positive", "hierarchical": "mean_positive", "hisa": "mean"}
    assert resolve_settings({"statistic": "mean"}, hf).statistic == "mean"
    with pytest.raises(MISAConfigError, match="cannot be 'median'"):
        resolve_settings({}, model(misa_statistic="median"))


def test_few_heads_limit_the_default():
    assert resolve_settings({}, model(index_n_heads=4)).active_heads == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"pool_block": 1024}, 2049), ({"pool_block": 4096}, 4096), ({"min_context": 9000}, 9000)],
)
def test_route_from_is_a_position(options, expected):
    assert resolve_settings(options, model()).route_from == expected


@pytest.mark.parametrize(("heads", "expected"), [(64, 37888), (32, 75776)])
def test_hierarchical_is_exact_where_that_is_as_fast(heads, expected):
    assert resolve_settings({"policy": "hierarchical"}, model(index_n_heads=heads)).min_context == expected
    given = resolve_settings({"policy": "hierarchical", "min_context": 0}, model(index_n_heads=heads))
    assert given.min_context == resolve_settings({}, model(index_n_heads=heads)).min_context == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pool_blok": 64}, ["pool_blok", "pool_block"]),
        ({"policy": "lisa"}, ["policy", "misa", "hierarchical", "dsa", "hisa"]),
        ({"policy": "hisa", "candidates": 2050}, ["candidates=2050", "multiple of 128"]),
        ({"active_heads": 0}, ["active_heads", "1"]),
        ({"active_heads": 65}, ["active_heads=65", "1 to 64"]),
        ({"active_heads": "many"}, ["active_heads", "integer"]),
        ({"pool_block": 32}, ["pool_block", "64"]),
        ({"pool_block": 100}, ["pool_block=100", "64"]),
        ({"candidates": 100}, ["candidates=100", "2048"]),
        ({"min_context": -1}, ["min_context", "0"]),
        ({"exact_decode": "often"}, ["exact_decode", "boolean"]),
        ({"audit_every": -1}, ["audit_every", "0"]),
        ({"statistic": "median"}, ["statistic", "median", "mean", "mean_positive"]),
        ({"statistic": 1}, ["statistic", "string"]),
        ({"policy": "hisa", "statistic": "mean_positive"}, ["hisa", "mean_positive", "misa or hierarchical"]),
        ("misa", ["additional_config"]),
    ],
)
def test_bad_options_name_the_remedy_in_one_line(options, named):
    with pytest.raises(MISAConfigError) as error:
        resolve_settings(options, model())
    message = str(error.value)
    assert "\n" not in message
    for word in named:
        assert word in message


def test_bad_checkpoint_fields_are_checked_like_options():
    with pytest.raises(MISAConfigError, match="pool_block=100"):
        resolve_settings({}, model(misa_k_block_size=100))


@pytest.mark.parametrize("policy", ["misa", "hierarchical", "dsa"])
def test_the_statistic_of_the_router(policy):
    assert resolve_settings({"policy": policy}, model()).statistic == "mean"
    assert resolve_settings({"policy": policy, "statistic": "mean_positive"}, model()).statistic == "mean_positive"


def test_model_without_indexer():
    llama = SimpleNamespace(architectures=["LlamaForCausalLM"])
    with pytest.raises(MISAConfigError, match="LlamaForCausalLM has no DSA indexer"):
        resolve_settings({}, llama)


def test_other_head_dim():
    with pytest.raises(MISAConfigError, match="index_head_dim is 64"):
        resolve_settings({}, model(index_head_dim=64))


def test_a_policy_says_itself_whether_it_routes():
    routing = {name: resolve_settings({"policy": name}, model()).routes_heads for name in POLICIES}
    assert routing == {"misa": True, "hierarchical": True, "dsa": False, "hisa": True}
