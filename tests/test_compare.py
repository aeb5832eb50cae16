"""compare on a tiny BERT: what it measures, what it says first, and the files it writes."""

import base64
import dataclasses
import json
import random
import re
import time
from html.parser import HTMLParser

import numpy as np
import processes
import pytest
import torch
from small_models import CONFIG, build
from tiny import make_checkpoint, make_reviews
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from typer.testing import CliRunner

import fastft
from fastft.cli.main import app
from fastft.functional._choice import use_backend
from fastft.testing.timing import Spread
from fastft.training import compare_job, compare_report, compare_run
from fastft.training.data import load

REVIEWS = make_reviews(120, seed=0)
SMALL = {"batch_size": 8, "max_length": 32, "steps": 3, "quiet": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("result")


@pytest.fixture(scope="module")
def result(model, folder):
    files = {"json": folder / "result.json", "html": folder / "result.html"}
    with use_backend("fastft"):  # nothing may fall back quietly
        return fastft.compare(model, REVIEWS, price=3.6, epochs=2, **files, **SMALL)


def plant(monkeypatch, spoil):
    """Replaces what fastft does to a model by ``spoil`` on top of it."""

    def prepare(model):
        fastft.optimize(model)
        spoil(model)

    stock, ours = compare_run.variants()[:2]
    monkeypatch.setattr(compare_run, "variants", lambda: [stock, compare_run.Variant(ours.name, prepare)])


# ---- what is measured


def test_numbers_of_a_sound_kernel_are_within_the_budget(result):
    assert not result.differs and result.parity.calls
    for row in result.parity.numbers.values():
        assert row["size"] > 0
        for pair in compare_run.PAIRS:
            assert row[pair]["max"] >= row[pair]["mean"] >= 0
    gradients = result.parity.numbers["gradients"]
    assert 0 < gradients["stock_exact"]["mean"] < 1e-3 * gradients["size"]


def test_every_variant_has_a_loss_for_every_step(result):
    off, on = result.losses["dropout_off"], result.losses["dropout_on"]
    variants = ["stock", "fastft", "fastft + fastft.optim"]
    assert list(off) == [*variants, compare_run.REVERSED] and list(on) == [*variants, compare_run.OTHER_SEED]
    assert {len(curve) for curve in (*off.values(), *on.values())} == {3}
    assert len(set(off["stock"])) == 3, "the steps trained nothing"
    assert off["stock"] != on["stock"] != on[compare_run.OTHER_SEED], "dropout made no difference"


def test_warming_up_leaves_no_trace(model):
    job = compare_job.load(model, load(REVIEWS), 8, 32, 0)
    longest, *batches = job.batches(2, 0)
    recipe, variants = compare_run.Recipe(None, 0), compare_run.variants()[:1]
    timed = compare_run.timed(job.network, variants, longest, batches, recipe, lambda: None)
    fresh = compare_run.Training(job.network, variants[0], recipe, dropout=True)
    for batch in batches:
        fresh.step(batch)
    assert timed["stock"].losses == fresh.losses


def test_phases_are_parts_of_the_step(result):
    for run in result.times.values():
        assert list(run.phases) == ["forward", "backward", "clip", "optimizer"]
        assert 0 < sum(run.phases.values()) <= run.mean and min(run.phases.values()) >= 0
    assert min(result.times["stock"].phases.values()) > 0  # fastft.optim clips within its step


def test_projection_is_steps_times_mean(result):
    assert result.rows == int(0.9 * len(set(REVIEWS[0]))) and result.steps == 2 * -(-result.rows // 8)
    assert result.seconds("stock") == result.steps * result.times["stock"].mean
    assert result.cost("stock") == pytest.approx(result.seconds("stock") / 1000)


def test_padding_is_less_when_grouped(result):
    assert 0 <= result.padding["grouped"] < result.padding["ungrouped"] < 1
    assert compare_job.padding_share([[0, 1], [2]], [1, 3, 5]) == pytest.approx(1 - 9 / 11)


def test_batches_are_of_all_sizes_after_the_longest(model):
    job = compare_job.load(model, load(REVIEWS), 8, 32, 0)
    longest, *batches = (batch["input_ids"].shape[1] for batch in job.batches(5, 0))
    everything = sorted(max(job.lengths[row] for row in rows) for rows in job.grouped)
    assert longest == everything[-1]
    assert sorted(batches) == everything[1::3], "one from the middle of each fifth"


def test_the_job_is_the_one_that_finetune_trains(model, tmp_path):
    texts, labels = REVIEWS
    rows = [f"{text} <b>FINE</b> caf\xe9\t{label}" for text, label in zip(texts, labels, strict=True)]
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(["text\tlabel", *rows, *rows[:7], "<br>\tpositive"]), encoding="latin-1")
    options = {"encoding": "latin-1", "lower_case": True}
    found = fastft.compare(model, path, **options, **{**SMALL, "steps": 2})
    sizes = {"batch_size": SMALL["batch_size"], "max_length": SMALL["max_length"]}
    trained = fastft.finetune(path, model, tmp_path / "out", quiet=True, epochs=1, **sizes, **options)
    told = [line for line in trained.facts["cleaned"].splitlines() if not line.endswith(": 0")]
    assert found.facts["cleaned"] == "; ".join(told) and "left out: 1;" in found.facts["cleaned"]
    run = json.loads((tmp_path / "out" / "run.json").read_text())["data"]
    assert found.rows == run["training"]["examples"] == len(set(rows)) - run["validation"]["examples"]
    assert found.steps == 3 * len(trained.step_losses), "3 epochs unless another number is asked for"
    assert f" {found.padding['grouped']:.1%} of the tokens are padding" in trained.facts["batches"]
    whole = fastft.compare(model, path, validation_share=0, **options, **{**SMALL, "steps": 2})
    assert whole.rows == len(set(rows)) and "put aside" in found.facts and "put aside" not in whole.facts


def test_memory_of_a_step_is_seen():
    def allocate():
        torch.ones(16 << 20)  # 64 MB

    growth = compare_run.peak_growth(allocate, torch.device("cpu"))
    assert growth is None or 60e6 < growth < 90e6


def test_what_is_kept_for_the_backward_is_counted(result):
    assert all(found["kept"] > 10_000 for found in result.memory.values())


@pytest.mark.parametrize(
    ("architecture", "config", "dtype"),
    [
        (RobertaForSequenceClassification, RobertaConfig, "float32"),
        (DistilBertForSequenceClassification, DistilBertConfig, "bfloat16"),
    ],
)
def test_other_architectures_without_data(architecture, config, dtype):
    names = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 112} if config is DistilBertConfig else CONFIG
    sizes = {"vocab_size": 101, "max_position_embeddings": 32}
    found = fastft.compare(architecture(config(**{**names, **sizes})), dtype=dtype, **{**SMALL, "steps": 2})
    assert "random tokens" in found.facts["data"] and not found.differs
    assert architecture.__name__ in str(found)


def test_the_model_and_the_random_state_stay_as_they_are():
    model = fastft.optimize(build(hidden_dropout_prob=0.1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    fastft.compare(model, **SMALL)
    assert draw() == expected
    assert [type(module) for module in model.modules()] == kinds and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_with_frozen_weights(model):
    network = AutoModelForSequenceClassification.from_pretrained(model)
    network.get_input_embeddings().requires_grad_(False)
    assert not fastft.compare(network, REVIEWS, **SMALL).differs


def test_a_saved_text_classifier(model, tmp_path):
    fastft.TextClassifier.from_pretrained(model).save_pretrained(tmp_path / "cls")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "cls")
    assert "TextClassifier from" in fastft.compare(tmp_path / "cls", REVIEWS, **SMALL).facts["model"]


def test_fastft_optim_is_a_third_variant_that_clips_within_its_step(result):
    assert list(result.times) == ["stock", "fastft", "fastft + fastft.optim"]
    assert result.times["fastft + fastft.optim"].phases["clip"] == 0
    assert "fastft + fastft.optim" in str(result)


# ---- what is said first


def test_a_slower_variant_is_said_first(model, monkeypatch):
    plant(monkeypatch, lambda model: model.register_forward_pre_hook(lambda *_: time.sleep(0.05)))
    found = fastft.compare(model, REVIEWS, **SMALL)
    assert found.slower == ["fastft"] and not found.differs
    assert str(found).startswith("fastft is SLOWER than stock here, 0.")


def test_a_differing_variant_is_said_first(model, monkeypatch):
    def spoil(model):
        model.bert.encoder.layer[1].output.register_forward_hook(lambda module, inputs, output: output * 1.0001)

    plant(monkeypatch, spoil)
    found = fastft.compare(model, REVIEWS, **SMALL)
    assert found.differs and str(found).startswith("fastft DIFFERS from stock here")
    assert "error budget exceeded" in str(found) and "worst element" in str(found)
    assert found.as_dict()["verdict"]["differs"] is True


def test_a_result_that_is_not_a_number_is_a_difference(model, monkeypatch, tmp_path):
    plant(monkeypatch, lambda model: model.classifier.register_forward_hook(lambda m, i, output: output * torch.nan))
    found = fastft.compare(model, REVIEWS, json=tmp_path / "nan.json", html=tmp_path / "nan.html", **SMALL)
    assert found.differs
    written = json.loads((tmp_path / "nan.json").read_text(), parse_constant=pytest.fail)
    assert written["losses"]["dropout_off"]["fastft"] == [None] * 3


def test_kernels_that_do_not_run_are_bad_news(model):
    with use_backend("torch"):
        found = fastft.compare(model, REVIEWS, **SMALL)
    assert "NONE of fastft's kernels ran here: FASTFT_BACKEND is torch." in found.verdict
    assert not found.is_good and "as close to float64" not in str(found)


@pytest.mark.parametrize(
    ("speedup", "median", "low", "high", "said"),
    [
        (1.2, 1.3, 1.1, 1.4, "fastft trains 1.20 times as fast as stock here (single steps 1.10 to 1.40)."),
        (1.0, 1.1, 0.9, 1.2, "fastft is as fast as stock within the noise, 1.00 times (single steps 0.90 to 1.20)."),
        (0.99, 1.1, 1.01, 1.2, "fastft is as fast as stock within the noise, 0.99 times (single steps 1.01 to 1.20)."),
        (0.9, 1.1, 1.0, 1.2, "fastft is SLOWER than stock here, 0.90 times as fast (single steps 1.00 to 1.20)."),
        (1.1, 0.9, 0.8, 1.2, "fastft is SLOWER than stock here, 0.90 times as fast (single steps 0.80 to 1.20)."),
        (0.98, 0.98, 0.96, 0.99, "fastft is SLOWER than stock here, 0.98 times as fast (single steps 0.96 to 0.99)."),
    ],
)
def test_verdict_by_all_steps_and_by_single_ones(result, speedup, median, low, high, said):
    run = planted_times(result, speedup, Spread(median, low, high, 20))
    assert compare_report.is_slower(run) is ("SLOWER" in said)
    assert compare_report.verdict(result.parity, {"fastft": run})[0] == said


def test_bad_news_come_before_good_ones(result):
    runs = {
        "fastft": planted_times(result, 1.5, Spread(1.5, 1.4, 1.6, 9)),
        "other": planted_times(result, 0.5, Spread(0.5, 0.4, 0.6, 9)),
    }
    first, second, third = compare_report.verdict(result.parity, runs)
    assert (
        first.startswith("other is SLOWER")
        and second.startswith("fastft trains")
        and third.startswith("fastft's logits")
    )


def test_no_kernel_at_all_comes_before_good_news(result):
    parity = dataclasses.replace(result.parity, calls={})
    first, second = compare_report.verdict(parity, {"fastft": planted_times(result, 1.5, Spread(1.5, 1.4, 1.6, 9))})
    assert first == "NONE of fastft's kernels ran here: every call is too small to gain."
    assert second.startswith("fastft trains")


def planted_times(result, speedup, ratio):
    return dataclasses.replace(result.times["fastft"], speedup=speedup, ratio=ratio)


# ---- what is written


def test_printed_in_80_columns(result):
    lines = str(result).splitlines()
    assert max(map(len, lines)) <= 80
    for expected in ("stock - float64", "backward", "tokens/s", "padding", "fastft's in", "cost at 3.6 an hour"):
        assert expected in str(result)


def test_json_holds_everything_that_was_measured(result, folder):
    written = json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert written == result.as_dict()
    assert set(written) == {
        *("verdict", "facts", "options", "numbers", "losses", "variants", "padding", "job", "kernels", "conditions"),
    }
    assert set(written["numbers"]) == {"logits", "loss", "gradients", "budget_exceeded"}
    for variant in written["variants"].values():
        assert set(variant) == {
            *("step", "step_times_as_fast", "mean", "times_as_fast", "phases", "tokens_per_s", "memory", "projected"),
        }
        assert set(variant["step"]) == {"median", "low", "high", "rounds"}
        assert set(variant["memory"]) == {"kept", "step"}
    assert written["kernels"]["modules"]["dropout"]["runs"] == "fastft"


class _Page(HTMLParser):
    """Raises on a tag that closes another one; collects what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.images = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [value for name, value in attributes.items() if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_well_formed_and_needs_nothing_else(result, folder):
    text = (folder / "result.html").read_text()
    page = _Page(text)
    (image,) = page.loads
    kind, _, data = image.partition(",")
    assert kind == "data:image/svg+xml;base64" and b"</svg>" in base64.b64decode(data)
    assert not re.search(r"https?://|@import|<script|url\(", text)
    for expected in ("stock - float64", "What runs where", "bert.pooler"):
        assert expected in text
    assert compare_report.page(result) == text, "the page of a result is always the same"


def test_html_shows_names_as_they_are(result):
    result.facts["model"], before = "<script>alert('a & b')</script>", result.facts["model"]
    try:
        assert "&lt;script&gt;alert(&#x27;a &amp; b&#x27;)&lt;/script&gt;" in compare_report.page(result)
    finally:
        result.facts["model"] = before


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "compare: steps=1; a whole number from 2 is needed"),
        ({"steps": 2.5}, "compare: steps=2.5 is a float; a whole number from 2 is needed"),
        ({"batch_size": 0}, "compare: batch_size=0; a whole number from 1 is needed"),
        ({"max_length": 2}, "compare: max_length=2; a whole number from 3 is needed"),
        ({"validation_share": 1}, "compare: validation_share=1; a number from 0 to below 1 is needed"),
        ({"validation_share": 0.99}, "validation_share=0.99 puts "),
        ({"price": -1}, "compare: price=-1; None or a number from 0 is needed"),
        ({"rows": True}, "compare: rows=True is a bool; None or a whole number from 1 is needed"),
        ({"dtype": "float16"}, "compare: dtype='float16' is none of auto, float32, bfloat16"),
        (
            {"data": None, "text": "review"},
            "compare: text='review' names a column of a file, but there is no data",
        ),
        ({"data": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"data": (["a", "<br>"], [0, 1])}, "data, row 0 is the only example"),
        ({"data": (["a", "b"], [1, 1])}, "data: every label is '1', two different ones are needed"),
        ({"model": "/no/such/model"}, "model='/no/such/model' cannot be loaded: "),
        ({"model": torch.nn.Linear(2, 2)}, "compare: model is a Linear, a transformers classifier or the name of one"),
        ({"model": build(BertModel)}, "compare: model is a BertModel, a transformers classifier or the name of one"),
        ({"model": build(num_labels=1)}, "compare: the model has problem_type=None, num_labels=1; a classifier with"),
        ({"model": build().half()}, "compare: the model's parameters must be torch.float32, bert.embeddings."),
        ({"model": build()}, "compare: the model names no checkpoint to take a tokenizer from"),
        (
            {"json": "/no/such/folder/a.json"},
            "/no/such/folder/a.json cannot be written: there is no folder /no/such/folder",
        ),
        ({"html": "/"}, "/ is not a regular file, it cannot be written"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_refuses_in_one_sentence(model, options, message):
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        fastft.compare(**{"model": model, "data": REVIEWS, **SMALL, **options})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_is_said_before_training(model, monkeypatch):
    monkeypatch.setattr(compare_run, "free_memory", lambda device: 1_000)
    with pytest.raises(MemoryError, match=r"the model has [\d,]+ parameters, training it 3 times side by side takes"):
        fastft.compare(model, REVIEWS, **SMALL)


def test_a_container_has_the_memory_that_cached_files_take(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_run, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert compare_run.free_memory(torch.device("cpu")) > 5000
    for name, content in (("max", "5000\n"), ("current", "4900\n"), ("stat", "anon 900\ninactive_file 4000\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert compare_run.free_memory(torch.device("cpu")) == 4100


# ---- the command


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "80", "NO_COLOR": "1"})


def test_command_prints_the_verdict_first_and_writes_files(model, tmp_path):
    texts, labels = REVIEWS
    rows = "\n".join(f"{label}\t{text}" for text, label in zip(texts, labels, strict=True))
    (tmp_path / "reviews.tsv").write_text(f"stars\treview\n{rows}\n")
    data = ("--data", tmp_path / "reviews.tsv", "--text", "review", "--label", "stars")
    files = ("--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    done = run("--model", model, *data, *files, "--batch-size", 8, "--max-length", 32, "--steps", 2)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "a.json").read_text())
    assert done.stdout.split()[:3] == written["verdict"]["sentences"][0].split()[:3]
    assert f"{int(0.9 * len(set(texts)))} rows to train on of" in written["facts"]["data"]
    assert _Page((tmp_path / "a.html").read_text())
    assert "\x1b" not in done.stdout and f"written: {tmp_path / 'a.html'}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 1), "compare: --steps 1; a whole number from 2 is needed\n"),
        (("--batch-size", 0), "compare: --batch-size 0; a whole number from 1 is needed\n"),
        (("--max-length", 2), "compare: --max-length 2; a whole number from 3 is needed\n"),
        (("--epochs", 0), "compare: --epochs 0; a whole number from 1 is needed\n"),
        (("--rows", 0), "compare: --rows 0; None or a whole number from 1 is needed\n"),
        (("--price", "nan"), "compare: --price nan; None or a number from 0 is needed\n"),
        (("--validation-share", -0.1), "compare: --validation-share -0.1; a number from 0 to below 1 is needed\n"),
        (("--seed", -1), "compare: --seed -1; a whole number from 0 to "),
        (("--dtype", "float16"), "--dtype: 'float16' is not one of "),
        (("--text", "review"), "compare: --text 'review' names a column of a file, but there is no data\n"),
        (("--json", "/no/such/folder/a.json"), "/no/such/folder/a.json cannot be written: there is no folder"),
        (("--html", "/dev/null"), "/dev/null is not a regular file, it cannot be written\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_command_refuses_with_one_sentence_and_status_2(arguments, message):
    done = processes.at_once("compare", "--model", "m", *arguments)
    assert done.status == 2 and done.out == ""
    assert done.err.startswith(f"fastft: {message}") and done.err.count("\n") == 1
