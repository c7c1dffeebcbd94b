"""`selective:PART+PART` in the executor: the right operations run again and no others, and the numbers stay the same."""

from __future__ import annotations

from collections import Counter

import pytest

from shardplan.costmodel.job import Job
from shardplan.costmodel.layout import parse_layout
from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.model_config import load_model
from shardplan.costmodel.runtime import load_runtime
from shardplan.hw_profiles.load import load_cluster
from shardplan.planner.search import judge

SEQ, LAYERS = 32, 2
LLAMA = LayerKind(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, gated_mlp=True, norm="rmsnorm")
GPT = LayerKind(
    hidden=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    ffn=96,
    gated_mlp=False,
    norm="layernorm",
    qkv_bias=True,
    mlp_bias=True,
    attention_output_bias=True,
)
OPERATIONS = {
    "products": ("mm", "addmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "norms": ("_fused_rms_norm", "rsqrt", "native_layer_norm"),
    "activations": ("silu", "gelu"),
}
# (recompute, layer, operations of a layer that run again): a Llama layer has seven products, a GPT layer six
AGAIN = [
    ("selective:layernorm", LLAMA, {"norms": 2}),
    ("selective:act", LLAMA, {"activations": 1}),
    ("selective:core_attn", LLAMA, {"attention": 1}),
    ("selective:qkv", LLAMA, {"products": 3}),
    ("selective:proj", LLAMA, {"products": 1}),
    ("selective:rope", LLAMA, {}),
    ("selective:mlp", LLAMA, {"products": 2, "activations": 1}),  # the last product is behind all that is needed
    ("selective:layernorm+act", LLAMA, {"norms": 2, "activations": 1}),
    ("selective:core_attn+layernorm+mlp", LLAMA, {"attention": 1, "norms": 2, "products": 2, "activations": 1}),
    ("selective:layernorm+act", GPT, {"norms": 2, "activations": 1}),
    ("selective:mlp", GPT, {"products": 1, "activations": 1}),
    ("full", LLAMA, {"products": 6, "attention": 1, "norms": 2, "activations": 1}),
]


def counted(word: str, kind: LayerKind):
    """(calls of each of OPERATIONS in forward and backward, loss, gradients by plain name)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from shardplan.executor.recompute import apply_recompute, parameter_name
    from shardplan.executor.transformer import build_transformer, whole

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls[func.name().removeprefix("aten::").partition(".")[0]] += 1
            return func(*args, **(kwargs or {}))

    shape = Model(name="small", family="llama", layers=((kind, LAYERS),), vocab=64, tied_embeddings=False)
    model = build_transformer(shape, seq=SEQ, part=whole(shape), seed=0, device=torch.device("cpu"))
    apply_recompute(model, word)
    tokens = torch.randint(0, 64, (2, SEQ + 1), generator=torch.Generator().manual_seed(0))
    with Count() as count:
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
    calls = {name: sum(count.calls[one] for one in same) for name, same in OPERATIONS.items()}
    gradients = {parameter_name(name): parameter.grad for name, parameter in model.named_parameters()}
    return calls, loss.item(), gradients


@pytest.mark.parametrize(("word", "kind", "again"), AGAIN)
def test_parts_that_are_named_run_again_and_no_others(word, kind, again):
    pytest.importorskip("torch", reason="the executor needs torch")
    plain, loss, gradients = counted("none", kind)
    calls, same_loss, same_gradients = counted(word, kind)
    assert {name: (calls[name] - plain[name]) / LAYERS for name in calls} == {**dict.fromkeys(calls, 0), **again}
    assert same_loss == loss
    assert set(same_gradients) == set(gradients)
    assert all(one.equal(same_gradients[name]) for name, one in gradients.items())


def judged(layout: str, runtime: str = "shardplan") -> dict | str:
    """The answer, or the rules that refuse."""
    verdict = judge(
        parse_layout(layout),
        model=load_model("llama-3-8b"),
        job=Job(seq=4096, global_batch=16),
        cluster=load_cluster("h100-ib", gpus=8),
        runtime=load_runtime(runtime),
    )
    refused = verdict["rejections"] if isinstance(verdict, dict) else verdict
    return " ".join(one["rule"] if isinstance(one, dict) else one.rule for one in refused) or verdict


# (recompute, values of a token that a layer keeps between forward and backward): 64 wide, keys and values 32 each, 96 in the MLP
KEPT = [
    ("selective:layernorm+act", 64 + 64 + 32 + 32 + 64 + 64 + 2 * 96),  # out, q, k, v, core, projection, gate and up
    ("selective:layernorm+act+core_attn", 64 + 64 + 32 + 32 + 64 + 2 * 96),
    ("selective:layernorm+act+qkv+rope+core_attn", 64 + 64 + 2 * 96),
]


@pytest.mark.parametrize(("word", "values"), KEPT)
def test_what_lives_after_the_forward_is_what_the_other_parts_wrote(word, values):
    torch = pytest.importorskip("torch", reason="the executor needs torch")
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    from shardplan.executor.recompute import apply_recompute
    from shardplan.executor.transformer import build_transformer, whole

    class Storages(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, torch.Tensor) and one.is_floating_point():
                    storage = one.untyped_storage()
                    if storage.data_ptr() not in held:
                        self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            return out

    shape = Model(name="small", family="llama", layers=((LLAMA, 1),), vocab=64, tied_embeddings=False)
    model = build_transformer(shape, seq=SEQ, part=whole(shape), seed=0, device=torch.device("cpu"))
    apply_recompute(model, word)
    held = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    x = torch.randn(2, SEQ, 64, requires_grad=True)
    with Storages() as storages:
        out = model.layers["0"](x, model.table)
    alive = sum(nbytes for ref, nbytes in storages.made.values() if not ref.expired())
    softmax_sums = 2 * SEQ * 4 * 4 if "core_attn" not in word else 0
    assert alive == 4 * 2 * SEQ * values + softmax_sums
    out.sum().backward()


def test_estimate_of_the_executor_drops_what_it_runs_again():
    def kept(recompute: str) -> float:
        answer = judged(f"dp=8 zero=3 recompute={recompute}")
        assert isinstance(answer, dict), answer
        return answer["memory"]["stages"][0]["activations_bytes"]

    layer = 2 * 4096 * 4096  # bytes of a hidden-wide tensor in 16 bits
    assert kept("none") - kept("selective:layernorm") == pytest.approx(32 * 2 * layer, rel=0.05)
    # the log-sum-exp in fp32 and the output
    assert kept("none") - kept("selective:core_attn") == pytest.approx(32 * (layer + 4 * 4096 * 32), rel=0.05)


def test_parts_and_tensor_parallelism_are_refused_together():
    assert judged("tp=8 recompute=selective:layernorm") == "recompute-tensor-parallel"
    assert isinstance(judged("tp=8 recompute=selective"), dict)
    assert isinstance(judged("dp=8 zero=3 recompute=selective:layernorm"), dict)


def test_compiled_layers_are_refused_where_torch_cannot_compile_them():
    assert judged("dp=2 tp=4 zero=1 recompute=selective", "shardplan+compile") == "recompute-tensor-parallel"
    assert judged("dp=4 cp=2 zero=3 recompute=selective", "shardplan+compile") == "recompute-context-parallel"
    assert isinstance(judged("dp=4 cp=2 zero=3 recompute=selective"), dict)
    assert judged("dp=8 zero=3 recompute=selective:act", "shardplan+compile") == "runtime-recompute-parts"
    for words in (
        "dp=2 tp=4 zero=1",
        "dp=2 tp=4 zero=1 recompute=full",
        "dp=4 cp=2 zero=3 recompute=full",
        "dp=8 zero=3 recompute=full",
        "dp=8 zero=3 recompute=selective",
    ):
        eager, compiled = judged(words), judged(words, "shardplan+compile")
        assert isinstance(eager, dict)
        assert isinstance(compiled, dict)
        assert compiled["time"]["step_s"] < eager["time"]["step_s"]
        assert compiled["memory"]["allocated_peak_bytes"] <= eager["memory"]["allocated_peak_bytes"]
