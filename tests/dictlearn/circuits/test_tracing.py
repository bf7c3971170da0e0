"""Edges are exact: sums, small interventions, ablations, selection of latents, scores."""

import dataclasses

import numpy as np
import pytest
import torch
import tracing_cases as cases

import vitmodels
from dictlearn.circuits.graph import Graph
from dictlearn.circuits.pruning import influence, latent_influence, prune, scores
from dictlearn.circuits.replacement import Replacement, replacement
from dictlearn.circuits.tracing import Readout, class_readouts, trace
from dictlearn.circuits.tracing_check import compare_effects
from dictlearn.circuits.tracing_effects import ablation, measure, predict


@pytest.fixture(scope="module")
def model() -> vitmodels.VisionModel:
    return cases.toy()


@pytest.fixture(scope="module")
def made(model: vitmodels.VisionModel) -> Replacement:
    return replacement(model, cases.pair(), cases.image(model))


@pytest.fixture(scope="module")
def graph(made: Replacement) -> Graph:
    return trace(made, class_readouts(made, [3, 5]))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_edges_and_bias_add_up_to_the_value(model: vitmodels.VisionModel, kind: str) -> None:
    """For every latent and logit, of every kind of transcoder."""
    made = replacement(model, cases.KINDS[kind](), cases.image(model))
    graph = trace(made, class_readouts(made, [3], contrast=None), batch_size=64)
    into = graph.of_kind("latent", "logit")
    value = np.array([graph.nodes[i].value for i in into])
    bias = np.array([graph.nodes[i].bias for i in into])
    np.testing.assert_allclose(graph.weights[into].sum(1) + bias, value, rtol=1e-4, atol=1e-4)
    assert np.abs(bias).max() > 0.01
    assert graph.scores["residual"] < 1e-4
    logit = graph.nodes[-1]
    assert logit.value == pytest.approx(float(made.values["logits"][0, 3]), rel=1e-5)


@pytest.fixture(scope="module")
def double() -> vitmodels.VisionModel:
    model = vitmodels.wrap(cases.toy().module.double())
    assert model.dtype == torch.float64
    return model


@pytest.mark.parametrize("kind", cases.KINDS)
def test_small_interventions_do_what_the_edges_say(
    double: vitmodels.VisionModel, kind: str
) -> None:
    """A latent a little up or down: later latents and the logits move as path sums predict.

    The replacement model is run again with its latents live; they stay on or off, being moved
    little, so the sum over all paths is exact. Double precision, so that a small step is no noise.
    """
    dictionaries = [d.double() for d in cases.KINDS[kind]()]
    made = replacement(double, dictionaries, cases.image(double))
    graph = trace(made, class_readouts(made, [3], contrast=None), batch_size=64)
    first = [graph.nodes[i] for i in graph.of_kind("latent") if graph.nodes[i].layer == 0]
    for node, sign in [(max(first, key=lambda n: n.influence), 1), (first[len(first) // 2], -1)]:
        step = sign * 1e-6
        expected = predict(graph, {node.id: step})
        found = measure(made, {(0, node.token, node.latent): step}, way="frozen")
        held = measure(made, {(0, node.token, node.latent): step}, way="fixed")
        torch.testing.assert_close(held["logits"], found["logits"], rtol=1e-6, atol=1e-14)
        wanted = torch.zeros_like(found["latents.1"])
        for i in graph.of_kind("latent"):
            other = graph.nodes[i]
            if other.layer == 1:
                wanted[other.token, other.latent] = expected[i]
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(found["latents.1"] / step, wanted / step, rtol=1e-3, atol=1e-5)
        assert float(found["logits"][3]) == pytest.approx(expected[-1], rel=1e-5)


def test_predicted_against_real_effects(made: Replacement, graph: Graph) -> None:
    """With the active latents held, any change of a latent does what is predicted, to 1e-4.

    A small one also where latents may switch, as long as none does. In the model itself only
    roughly; its MLPs are not the untrained transcoders of this test.
    """
    readouts = class_readouts(made, [3, 5])
    found = compare_effects(made, graph, readouts, nodes=10, factor=0.99)
    for way in ("fixed", "frozen"):
        assert float(found["error"].sel(way=way)) < 1e-3
        assert float(found["correlation"].sel(way=way)) > 0.99999
    assert float(found["error"].sel(way="model")) > float(found["error"].sel(way="fixed"))
    large = compare_effects(made, graph, readouts, nodes=10, factor=-2.0, ways=["fixed"])
    assert float(large["error"].sel(way="fixed")) < 1e-4
    assert found["predicted"].dims == ("node", "logit")
    assert found["real"].sizes == {"way": 4, "node": 10, "logit": 2}
    one = found["node"].values.tolist()[0]
    alone = compare_effects(made, graph, readouts, nodes=[one], factor=0.0, ways=["model"])
    node = graph.nodes[graph.number(one)]
    change = {(node.layer, node.token, node.latent): -node.value}
    logits = measure(made, change, way="model")["logits"]
    assert float(alone["real"][0, 0, 1]) == pytest.approx(
        float(logits[5] - logits.mean()), abs=1e-5
    )
    with pytest.raises(ValueError, match=r"explains \['3', '5'\], the readouts are \['3'\]"):
        compare_effects(made, graph, readouts[:1])
    with pytest.raises(ValueError, match="a factor of 1 changes nothing"):
        compare_effects(made, graph, readouts, factor=1.0)


def test_direct_effects_alone(made: Replacement, graph: Graph) -> None:
    """With all other MLP outputs held, a logit moves by the single edge."""
    logit = graph.number("logit/3")
    number = next(i for i in graph.of_kind("latent") if graph.weights[logit, i] != 0)
    node = graph.nodes[number]
    code = made.codes[node.layer]
    outs = [made.leaf(layer)[None].clone() for layer in range(2)]
    row = code.decoder_rows(node.layer, torch.tensor([node.token]), torch.tensor([node.latent]))[0]
    outs[node.layer][0, node.token] -= node.value * row
    got = made.frozen_pass(made.embed[None], made.leaves(outs), ["logits"])["logits"][0]
    change = got - made.values["logits"][0]
    effect = float(change[3] - change.mean())
    assert effect == pytest.approx(-graph.weights[logit, number], rel=1e-3, abs=1e-5)
    alone = predict(graph, {node.id: -node.value}, direct=True)
    assert alone[logit] == pytest.approx(effect, rel=1e-3, abs=1e-5)


def test_errors_and_patches_taken_away(made: Replacement, graph: Graph) -> None:
    """Inputs and errors are nodes like others: without one, its whole share goes."""
    logit = graph.number("logit/3")
    error = max(graph.of_kind("error"), key=lambda i: abs(graph.weights[logit, i]))
    node = graph.nodes[error]
    outs = [made.leaf(layer)[None].clone() for layer in range(2)]
    outs[node.layer][0, node.token] -= made.error[node.layer][node.token]
    got = made.frozen_pass(made.embed[None], made.leaves(outs), ["logits"])["logits"][0]
    change = got - made.values["logits"][0]
    assert float(change[3] - change.mean()) == pytest.approx(-graph.weights[logit, error], rel=1e-3)
    patch = graph.number("embed/7")
    embed = made.embed.clone()
    embed[7] -= made.content[7]
    held = made.leaves([made.leaf(layer)[None] for layer in range(2)])
    got = made.frozen_pass(embed[None], held, ["logits"])["logits"][0]
    change = got - made.values["logits"][0]
    assert float(change[3] - change.mean()) == pytest.approx(
        -graph.weights[logit, patch], rel=1e-3, abs=1e-5
    )


def test_ways_of_intervening_differ_as_they_should(made: Replacement, graph: Graph) -> None:
    node = graph.nodes[graph.of_kind("latent")[0]]
    changes = {(node.layer, node.token, node.latent): -node.value}
    effect = {
        way: measure(made, changes, way=way)["logits"]  # type: ignore[arg-type]
        for way in ("frozen", "replaced", "model")
    }
    assert all(bool(value.any()) for value in effect.values())
    assert not torch.allclose(effect["frozen"], effect["replaced"])
    assert not torch.allclose(effect["replaced"], effect["model"])
    latents = measure(made, changes, way="frozen")["latents.0"]
    assert float(latents[node.token, node.latent]) == pytest.approx(-node.value)
    assert int((latents != 0).sum()) == 1


@pytest.mark.parametrize("kind", ["topk", "cross_layer", "layer_norm"])
def test_ablation_on_the_model_itself(model: vitmodels.VisionModel, kind: str) -> None:
    """Edits for a batch do what the single intervention ``way="model"`` does."""
    made = replacement(model, cases.KINDS[kind](), cases.image(model))
    e = made.entries[0]
    latent = int(e.latent[0])
    at = [i for i in range(len(e.latent)) if int(e.latent[i]) == latent]
    changes = {(0, int(e.token[i]), latent): -float(e.value[i]) for i in at}
    effect = measure(made, changes, way="model")["logits"]
    with model.editing(ablation(made.parts, {0: [latent]})):
        batch = model(made.x.expand(3, -1, -1, -1))
    for row in batch:
        torch.testing.assert_close(row - made.values["logits"][0], effect, rtol=1e-3, atol=1e-5)
    assert ablation(made.parts, {}) == {}
    with pytest.raises(ValueError, match=r"no latent 48 at layer 1: 0 to 47"):
        ablation(made.parts, {1: [48]})
    with pytest.raises(ValueError, match="no layer 7"):
        ablation(made.parts, {7: [0]})


def test_fewer_latents_than_active_keep_the_sums(made: Replacement, graph: Graph) -> None:
    """The others count as error: sums stay exact, and scores do not get better."""
    total = len(graph.of_kind("latent"))
    few = trace(made, class_readouts(made, [3, 5]), max_latents=40, batch_size=8)
    assert len(few.of_kind("latent")) == 40 < total
    assert few.scores["residual"] < 1e-4
    assert few.scores["replacement"] < graph.scores["replacement"]
    assert few.scores["completeness"] < graph.scores["completeness"]
    whole = {graph.nodes[i].id: influence(graph)[i] for i in graph.of_kind("latent")}
    kept = [few.nodes[i].id for i in few.of_kind("latent")]
    best = sorted(whole.values())[-40:]
    assert sum(whole[id] for id in kept) > 0.8 * sum(best)
    ids = {node.id: node for node in graph.nodes}
    logits = {few.nodes[i].id: few.weights[:, i] for i in few.of_kind("latent")}
    assert set(logits) <= set(ids)


def test_batches_do_not_matter(made: Replacement, graph: Graph) -> None:
    other = trace(made, class_readouts(made, [3, 5]), batch_size=7)
    assert [n.id for n in other.nodes] == [n.id for n in graph.nodes]
    np.testing.assert_allclose(other.weights, graph.weights, rtol=1e-4, atol=1e-6)


def test_perfect_transcoders_leave_no_error(made: Replacement) -> None:
    """Without error nodes the scores are 1, and with them they are below."""
    silent = dataclasses.replace(
        made,
        error=tuple(torch.zeros_like(v) for v in made.error),
    )
    graph = trace(silent, class_readouts(silent, [3]))
    assert graph.scores["replacement"] == pytest.approx(1.0)
    assert graph.scores["completeness"] == pytest.approx(1.0)
    assert graph.scores["logits_without_errors"] == pytest.approx(1.0)
    noisy = trace(made, class_readouts(made, [3])).scores
    assert 0 < noisy["replacement"] < 0.99
    assert 0 < noisy["completeness"] < 0.99
    assert 0 < noisy["logits_without_errors"] < 0.99


def test_positions_are_apart_from_patches(made: Replacement, graph: Graph) -> None:
    """The class token is a position; a patch is both; together they are the embedding."""
    ids = {node.id for node in graph.nodes}
    assert "position/0" in ids
    assert "embed/0" not in ids
    assert {"position/7", "embed/7"} <= ids
    assert graph.nodes[graph.number("embed/7")].place == (1, 1)
    assert graph.nodes[graph.number("latent/" + "/".join(map(str, _first(graph))))].kind == "latent"
    torch.testing.assert_close(made.content + (made.embed - made.content), made.embed)


def _first(graph: Graph) -> tuple[int, int, int]:
    node = graph.nodes[graph.of_kind("latent")[0]]
    return node.layer, node.token, node.latent


def test_readouts_of_classes(made: Replacement) -> None:
    likely = class_readouts(made)
    logits = made.values["logits"][0]
    assert likely[0].index == int(logits.argmax())
    assert sum(r.probability for r in likely) >= 0.95 or len(likely) == 10
    named = class_readouts(made, [1], contrast=2, names=[f"digit {i}" for i in range(10)])[0]
    assert named.name == "digit 1"
    assert named.value(made) == pytest.approx(float(logits[1] - logits[2]), rel=1e-4)
    with pytest.raises(ValueError, match=r"class 11 of toy/digits-2l does not exist: 0 to 9"):
        class_readouts(made, [11])
    with pytest.raises(ValueError, match="contrast is 'mean', a class number or None"):
        class_readouts(made, [1], contrast="max")


def test_readouts_that_do_not_fit(made: Replacement) -> None:
    with pytest.raises(ValueError, match=r"direction of readout 'a' has shape \(3,\), pooled has"):
        trace(made, [Readout(name="a", site="pooled", direction=torch.ones(3))])
    with pytest.raises(ValueError, match=r"is at 'embed'; toy/digits-2l has .*final, pooled"):
        trace(made, [Readout(name="a", site="embed", direction=torch.ones(3))])
    with pytest.raises(ValueError, match="at least one readout"):
        trace(made, [])
    with pytest.raises(ValueError, match="must be >= 1: 0"):
        trace(made, max_latents=0)


def test_interventions_that_do_not_exist(made: Replacement, graph: Graph) -> None:
    with pytest.raises(ValueError, match=r"no latent \(layer 5, token 0, latent 0\): there are 2"):
        measure(made, {(5, 0, 0): 1.0})
    with pytest.raises(ValueError, match=r"way is one of fixed, frozen, .*, not 'real'"):
        measure(made, {}, way="real")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"no node 'latent/0/0/999'.*nearest"):
        predict(graph, {"latent/0/0/999": 1.0})
    with pytest.raises(ValueError, match="logit/3 is a logit"):
        predict(graph, {"logit/3": 1.0})


def test_pruned_graphs_of_a_trace(graph: Graph) -> None:
    small = prune(graph)
    assert len(small.nodes) < len(graph.nodes) / 2
    assert small.scores == graph.scores
    assert small.pruning["nodes_before"] == len(graph.nodes)
    whole = scores(graph)
    assert whole["completeness"] == pytest.approx(graph.scores["completeness"])
    by_latent = latent_influence(graph)
    assert list(by_latent.values()) == sorted(by_latent.values(), reverse=True)
