"""The description of a model that plan files embed: exact round trip, digest, checks at the door."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.model import LayerKind, Model
from shardplan.costmodel.model_config import load_model, model_digest, model_document, model_from_document
from shardplan.costmodel.presets import all_presets
from shardplan.hw_profiles.errors import InputError

SIZES = st.integers(1, 512)


@st.composite
def layer_kinds(draw, hidden):
    kv_heads, experts = draw(st.integers(1, 8)), draw(st.integers(0, 8))
    return LayerKind(
        hidden=hidden,
        heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        head_dim=draw(SIZES),
        ffn=draw(SIZES),
        gated_mlp=draw(st.booleans()),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        qkv_bias=draw(st.booleans()),
        attention_output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        rotary=draw(st.booleans()),
        dropout=draw(st.booleans()),
        experts=experts,
        experts_per_token=draw(st.integers(1, experts)) if experts else 0,
    )


@st.composite
def models(draw):
    runs = st.tuples(layer_kinds(draw(SIZES)), st.integers(1, 200))
    return Model(
        name=draw(st.text(min_size=1)),
        family=draw(st.sampled_from(["llama", "gpt2", "mixtral"])),
        layers=tuple(draw(st.lists(runs, min_size=1, max_size=4))),
        vocab=draw(st.integers(1, 300_000)),
        tied_embeddings=draw(st.booleans()),
        learned_positions=draw(st.integers(0, 4096)),
        max_positions=draw(st.none() | st.integers(1, 10**6)),
        source=draw(st.text()),
    )


@given(models())
def test_round_trip_is_exact_through_json_text(model):
    again = model_from_document(json.loads(json.dumps(model_document(model))))
    assert again == model
    assert model_digest(again) == model_digest(model)


@pytest.mark.parametrize("name", all_presets())
def test_presets_round_trip(name):
    assert model_from_document(model_document(load_model(name))) == load_model(name)


def test_the_document_holds_every_field_that_differs_from_its_default():
    models = [load_model(name) for name in all_presets()]
    unused = {"mtp"}  # follows from mtp_modules
    for kind, described in ((Model, models), (LayerKind, [kind for model in models for kind, _ in model.layers])):
        seen: set[str] = set()
        for item in described:
            document = model_document(item) if isinstance(item, Model) else layer_document(item)
            differing = {field.name for field in fields(kind) if getattr(item, field.name) != field.default}
            assert differing <= set(document)
            seen |= set(document)
        assert seen == {field.name for field in fields(kind)} - unused


def layer_document(kind: LayerKind) -> dict[str, object]:
    document = model_document(replace(load_model("tiny"), layers=((kind, 1),)))["layers"][0]
    return {key: value for key, value in document.items() if key != "count"}


def test_documents_and_digests_of_older_models_are_as_they_were():
    """Plan files hold them: a new field must not change what they say of a model that does not have it."""
    assert model_digest(load_model("llama-3-8b")) == "ed0ec2b8d8b8e47f8d5ffd02f50311c750b4b54b2007500efc50b603db09f8a5"
    assert (
        model_digest(load_model("mixtral-8x7b")) == "f4d1cd65bbfa84b8ae8a28a51f425e57977fa10b7f07b1e78e1f9a88394d81e7"
    )


def test_a_document_cannot_call_a_layer_a_prediction_module():
    document = model_document(load_model("tiny"))
    document["layers"][0]["mtp"] = True
    with pytest.raises(InputError, match="mtp=true is unknown"):
        model_from_document(document)


def test_fields_with_a_default_may_be_left_out():
    layer = {"count": 2, "hidden": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "ffn": 16, "gated_mlp": True}
    document = {"name": "m", "family": "llama", "vocab": 10, "tied_embeddings": False}
    model = model_from_document({**document, "layers": [{**layer, "norm": "rmsnorm"}]})
    assert model.layer_count == 2
    assert model.max_positions is None


def test_digest_is_of_the_shapes_alone():
    model = load_model("tiny")
    ((kind, count),) = model.layers
    assert model_digest(model) == model_digest(replace(model, name="other", source="elsewhere", family="x"))
    assert model_digest(model) == model_digest(replace(model, layers=((kind, 1), (kind, count - 1))))
    for other in (
        replace(model, vocab=257),
        replace(model, tied_embeddings=True),
        replace(model, max_positions=1024),
        replace(model, layers=((kind, count + 1),)),
        replace(model, layers=((replace(kind, dropout=True), count),)),
    ):
        assert model_digest(other) != model_digest(model)


def test_digests_of_different_presets_differ_unless_the_shapes_are_equal():
    assert len({model_digest(load_model(name)) for name in all_presets()}) == len(all_presets())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab": 0}, ["vocab=0 is out of range", "write an integer from 1"]),
        ({"vocab": True}, ["vocab=true is not an integer"]),
        ({"learned_positions": -1}, ["learned_positions=-1", "from 0 to"]),
        ({"max_positions": 0}, ["max_positions=0"]),
        ({"tied_embeddings": None}, ["tied_embeddings=null", "true or false"]),
        ({"name": ""}, ['name=""', "write a text"]),
        ({"name": 4}, ["name=4", "write a text"]),
        ({"source": 4}, ["source=4", "write a text"]),
        ({"layers": []}, ["layers=[]", "write a list"]),
        ({"layers": {"count": 1}}, ["layers=", "write a list"]),
        ({"layers": [3]}, ["layers[0]: 3 is not a JSON object"]),
        ({"vocabulary": 5}, ["vocabulary=5 is unknown", "did you mean vocab"]),
    ],
)
def test_bad_documents(change, words):
    with pytest.raises(InputError) as error:
        model_from_document({**model_document(load_model("tiny")), **change}, place="plan.json: model")
    message = str(error.value)
    assert message.startswith("plan.json: model")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_heads": 3}, ["kv_heads=3 does not divide heads=4", "1, 2, 4"]),
        ({"hidden": 1.0}, ["hidden=1.0 is not an integer"]),
        ({"count": 0}, ["count=0 is out of range", "from 1 to 10000"]),
        ({"norm": "batchnorm"}, ['norm="batchnorm" is unknown', "rmsnorm or layernorm"]),
        ({"gated_mlp": "yes"}, ['gated_mlp="yes"', "true or false"]),
        ({"experts": 2}, ["experts_per_token=0", "from 1"]),
        ({"experts": 2, "experts_per_token": 3}, ["experts_per_token=3 is more than experts=2"]),
        ({"experts_per_token": 2}, ["experts_per_token=2 needs experts", "write 0"]),
        ({"head_dims": 4}, ["head_dims=4 is unknown", "did you mean head_dim"]),
    ],
)
def test_bad_layers_name_the_run(change, words):
    document = model_document(load_model("tiny"))
    document["layers"] = [{**document["layers"][0], **change}]
    with pytest.raises(InputError) as error:
        model_from_document(document)
    message = str(error.value)
    assert message.startswith("model: layers[0]: ")
    assert all(word in message for word in words), message


def test_missing_fields_unequal_widths_and_absurd_sizes():
    document = model_document(load_model("tiny"))
    layer = document["layers"][0]
    with pytest.raises(InputError, match="vocab is missing; add vocab"):
        model_from_document({key: value for key, value in document.items() if key != "vocab"})
    with pytest.raises(InputError, match=r"layers\[0\]: heads is missing"):
        model_from_document({**document, "layers": [{key: layer[key] for key in layer if key != "heads"}]})
    with pytest.raises(InputError, match=r"layers\[1\]: hidden=64 differs from layers\[0\].hidden=128"):
        model_from_document({**document, "layers": [layer, {**layer, "hidden": 64}]})
    with pytest.raises(InputError, match="layers add up to 20000"):
        model_from_document({**document, "layers": [{**layer, "count": 10_000}] * 2})
    with pytest.raises(InputError, match="parameters, more than"):
        model_from_document({**document, "vocab": 2**31 - 1, "layers": [{**layer, "hidden": 2**31 - 1}]})
    with pytest.raises(InputError, match="is not a JSON object"):
        model_from_document([document])
