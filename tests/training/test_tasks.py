"""Downstream tasks: lm-eval's figures against plain loops over log-likelihoods, and the stage within a run."""

import io
import json
import math
import shutil
import socket
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from rich.console import Console
from scipy.stats import t

from bilect.cli.evaluating import _short, _tables
from bilect.cli.screens import _tasks_table
from bilect.config import parse_config
from bilect.data.documents import Document
from bilect.data.tokens import TokenStore, write_tokens
from bilect.errors import BilectError
from bilect.integrations.lm_eval_model import LMEvalModel
from bilect.models.loading import load_causal_lm, load_tokenizer, train_tokenizer
from bilect.pipeline.context import RunContext
from bilect.pipeline.plan import plan_run
from bilect.pipeline.stages import run, stages, states
from bilect.pipeline.texts import input_hashes
from bilect.report.wording import measured
from bilect.runtime.progress import SilentProgress
from bilect.runtime.terminal import PlainConsole
from bilect.training import tasks
from bilect.training.evaluation import evaluate
from bilect.training.task_examples import Examples, paired_difference
from tests.corpus import tiny_settings, write_corpus, write_jsonl
from tests.helpers import tiny_lm

EXAMPLES = Path(__file__).parents[2] / "examples" / "tasks"
WORDS = [
    "sun",
    "rain",
    "wind",
    "cloud",
    "storm",
    "sky",
    "blue",
    "grey",
    "sum",
    "root",
    "prime",
    "angle",
    "proof",
    "lemma",
    "set",
    "map",
]
RNG = np.random.default_rng(0)


def _words(low: int, high: int) -> str:
    return " ".join(RNG.choice(WORDS, size=RNG.integers(low, high)))


ARC = [
    {"query": f"Question: {_words(3, 9)}?\nAnswer:", "choices": [_words(1, 5) for _ in range(4)], "gold": i % 4}
    for i in range(10)
]
PIQA = [{"goal": _words(2, 5), "sol1": _words(2, 9), "sol2": _words(2, 9), "label": i % 2} for i in range(10)]
LAMBADA = [{"prompt": _words(5, 12), "response": " " + ["lemma", "zebra", "sky"][i % 3]} for i in range(10)]
GSM8K = [{"question": _words(5, 9), "answer": f"{_words(5, 30)} é\n#### {i}"} for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model and its tokenizer, ours: 320 ids, 2048 positions."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 8, 320)
    model = tiny_lm(vocab=320, dtype=torch.float32, context=128)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The shipped task files, with data where they look for it."""
    folder = tmp_path_factory.mktemp("examples") / "tasks"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("data"))
    (folder / "data").mkdir()
    for name, records in (("arc_easy", ARC), ("piqa", PIQA), ("lambada", LAMBADA), ("gsm8k", GSM8K)):
        write_jsonl(folder / "data" / f"{name}.jsonl", records)
    return folder


@pytest.fixture
def log_likelihood(folder):
    """Of an answer after a text that starts with the start token; and whether each of its tokens is the likeliest."""
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def of(given, answer, context=128):
        n = len(encode(given + answer)) - len(encode(given))
        ids = torch.tensor([tokenizer.bos_token_id, *encode(given + answer)])
        step, total, greedy = n if n <= context else context // 2, 0.0, True
        for first in range(len(ids) - n, len(ids), step):
            end = min(first + step, len(ids))
            window = ids[max(end - context - 1, 0) : end]
            logits_TV = model(window[None, :-1]).logits[0, first - end :]
            total += float(logits_TV.log_softmax(-1).gather(1, ids[first:end, None]).sum())
            greedy &= bool((logits_TV.argmax(-1) == ids[first:end]).all())
        return total, greedy

    return of


def test_multiple_choice_is_the_likeliest_answer(folder, examples, log_likelihood, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)  # data files are found from the task file, wherever we are
    names = [str(examples / "arc_easy.yaml"), str(examples / "piqa.yaml")]
    results, cost = tasks.run_tasks(folder, names, batch_tokens=100)
    assert capfd.readouterr() == ("", "")
    piqa = [
        {"query": f"Question: {r['goal']}\nAnswer:", "choices": [r["sol1"], r["sol2"]], "gold": r["label"]}
        for r in PIQA
    ]
    for task, records in (("arc_easy_local", ARC), ("piqa_local", piqa)):
        right, right_normed = [], []
        for r in records:
            ll = np.array([log_likelihood(r["query"], " " + choice)[0] for choice in r["choices"]])
            right.append(ll.argmax() == r["gold"])
            # lm-eval's length: characters of the choice, without the space before it
            right_normed.append((ll / [len(choice) for choice in r["choices"]]).argmax() == r["gold"])
        assert results[task]["n"] == 10
        assert set(results[task]) == {"acc", "acc_norm", "answer_bits_per_byte", "n"}
        bits = [-log_likelihood(r["query"], " " + r["choices"][r["gold"]])[0] / math.log(2) for r in records]
        n_bytes = [len(r["choices"][r["gold"]].encode()) for r in records]
        assert results[task]["answer_bits_per_byte"]["value"] == pytest.approx(sum(bits) / sum(n_bytes), rel=1e-4)
        for metric, hits in (("acc", right), ("acc_norm", right_normed)):
            found = results[task][metric]
            assert found["value"] == pytest.approx(np.mean(hits))
            assert found["stderr"] == pytest.approx(statistics.stdev(map(float, hits)) / math.sqrt(10))
        assert right != right_normed  # else nothing is tested
    assert cost["tokens"] > 0 and cost["flops"] > 0


def test_lambada_is_what_the_evaluation_of_held_out_sets_says(folder, examples, log_likelihood, tmp_path):
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    documents = [
        Document(str(i), "lambada", r["prompt"] + r["response"], prompt=r["prompt"], record=i)
        for i, r in enumerate(LAMBADA)
    ]
    write_tokens(documents, tokenizer, tmp_path / "l.arrow", context=128)
    ours = evaluate(model, TokenStore(tmp_path / "l.arrow"), 0)
    results, _ = tasks.run_tasks(folder, [str(examples / "lambada.yaml")])
    found = results["lambada_local"]
    assert ours.tokens > ours.documents  # lm-eval's perplexity is per answer, ours per token
    assert found["perplexity"]["value"] == pytest.approx(math.exp(ours.loss * ours.tokens / ours.documents), rel=1e-4)
    pairs = [log_likelihood(r["prompt"], r["response"]) for r in LAMBADA]
    perplexity = math.exp(-statistics.mean(ll for ll, _ in pairs))
    assert found["perplexity"]["value"] == pytest.approx(perplexity, rel=1e-4)
    error = perplexity * statistics.stdev(ll for ll, _ in pairs) / math.sqrt(10)
    assert found["perplexity"]["stderr"] == pytest.approx(error, rel=1e-4)
    assert found["acc"]["value"] == ours.accuracy == statistics.mean(greedy for _, greedy in pairs)
    n_bytes = sum(len(r["response"].strip().encode()) for r in LAMBADA)
    bits = -sum(ll for ll, _ in pairs) / math.log(2)
    assert found["answer_bits_per_byte"]["value"] == pytest.approx(bits / n_bytes, rel=1e-4)


def test_a_worked_solution_in_bits_per_byte(folder, examples, log_likelihood):
    results, _ = tasks.run_tasks(folder, [str(examples / "gsm8k.yaml")])
    pairs = [log_likelihood(f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in GSM8K]
    bits, n_bytes = (-sum(ll for ll, _ in pairs) / math.log(2), sum(len(r["answer"].encode()) for r in GSM8K))
    assert results["gsm8k_local"]["answer_bits_per_byte"]["value"] == pytest.approx(bits / n_bytes, rel=1e-4)
    assert results["gsm8k_local"]["acc"]["value"] == 0


def test_bits_per_byte_count_each_byte_once(folder, examples, log_likelihood):
    rolling = yaml.safe_load((examples / "gsm8k.yaml").read_text())
    rolling |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    ], "doc_to_target": "Question: {{question}}\nAnswer: {{answer}}"}  # fmt: skip
    (examples / "rolling.yaml").write_text(yaml.safe_dump(rolling))
    texts = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in GSM8K]
    results, _ = tasks.run_tasks(folder, [str(examples / "rolling.yaml")], limit=3)
    bits = [-log_likelihood("", text)[0] / math.log(2) for text in texts[:3]]
    n_bytes = [len(text.encode()) for text in texts[:3]]
    found = results["gsm8k_local"]
    assert found["n"] == 3
    assert found["bits_per_byte"]["value"] == pytest.approx(sum(bits) / sum(n_bytes), rel=1e-4)
    residuals = [b - found["bits_per_byte"]["value"] * n for b, n in zip(bits, n_bytes, strict=True)]
    error = math.sqrt(3 / 2 * sum(r * r for r in residuals)) / sum(n_bytes)
    assert found["bits_per_byte"]["stderr"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("context", [12, 3])
def test_a_long_text_loses_its_left_end(folder, examples, log_likelihood, context):
    results, _ = tasks.run_tasks(folder, [str(examples / "lambada.yaml")], context=context)
    cut = [log_likelihood(r["prompt"], r["response"], context)[0] for r in LAMBADA]
    whole = [log_likelihood(r["prompt"], r["response"])[0] for r in LAMBADA]
    assert results["lambada_local"]["perplexity"]["value"] == pytest.approx(math.exp(-np.mean(cut)), rel=1e-4)
    assert not np.allclose(cut, whole, rtol=1e-3)


def test_an_answer_in_pieces_is_likeliest_where_every_piece_is(folder):
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    with torch.no_grad():
        next_V = model(torch.arange(320)[:, None]).logits[:, 0].argmax(-1).tolist()
    first = next_V[5]
    likeliest, wrong = [first, next_V[first]], [first + 1, next_V[first + 1]]
    lm = LMEvalModel(model, tokenizer, context=1)  # each token is a piece, given the one before it
    found = lm._loglikelihood_tokens([(("", ""), [0, 5], answer) for answer in (likeliest, wrong)])
    assert [greedy for _, greedy in found] == [True, False]


def test_an_answer_without_tokens_is_one_line(folder, examples, tmp_path):
    shutil.copytree(examples, tmp_path / "tasks")
    write_jsonl(tmp_path / "tasks" / "data" / "lambada.jsonl", [*LAMBADA, {"prompt": "sun", "response": ""}])
    with pytest.raises(BilectError, match="the answer '' has no tokens"):
        tasks.run_tasks(folder, [str(tmp_path / "tasks" / "lambada.yaml")])


@pytest.mark.parametrize(("aggregation", "f"), [("mean", lambda r: r), ("perplexity", lambda r: math.exp(-r))])
def test_standard_error_is_that_of_repeated_draws(aggregation, f):
    draws = RNG.normal(1.0, 0.5, size=(4000, 50))
    values = [f(x.mean()) for x in draws]
    stated = [Examples(aggregation, v, list(x)).stderr for v, x in zip(values, draws, strict=True)]
    assert np.mean(stated) == pytest.approx(np.std(values), rel=0.05)
    assert Examples("median", 1.0, [1.0, 2.0]).stderr is None and Examples("mean", 1.0, [1.0]).stderr is None


def test_a_paired_interval_covers_the_difference_and_is_narrower_than_two_models_apart():
    """Bits per byte of two models, whose examples share what makes them hard."""
    covered, narrower, runs = 0, 0, 400
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        w, hard = rng.integers(20, 80, 60), rng.normal(2.0, 0.5, 60)
        x = [hard * w + rng.normal(0, 2, 60), (hard - 0.1) * w + rng.normal(0, 2, 60)]
        a, b = (Examples("mean", m.sum() / w.sum(), list(zip(m, w, strict=True))) for m in x)
        found = paired_difference(a, b)
        covered += found["low"] <= -0.1 <= found["high"]
        narrower += found["high"] - found["low"] < 2 * math.hypot(a.stderr, b.stderr)
        assert found["p"] is None  # no share of right answers
    assert 0.92 <= covered / runs <= 0.98 and narrower == runs
    with pytest.raises(BilectError, match="60 and 59 examples cannot be paired"):
        paired_difference(a, Examples("mean", 0.0, list(b.samples[1:])))


def test_mcnemar_counts_what_one_model_alone_has_right():
    """Seven examples gained, one lost: 2 (C(8,0) + C(8,1)) / 2^8."""
    before = [1.0] * 5 + [0.0] * 7 + [1.0] + [0.0] * 4
    after = [1.0] * 5 + [1.0] * 7 + [0.0] + [0.0] * 4
    found = paired_difference(Examples("mean", np.mean(before), before), Examples("mean", np.mean(after), after))
    assert found["difference"] == pytest.approx(6 / 17) and found["p"] == pytest.approx(18 / 256)
    d = np.subtract(after, before)
    half = t.ppf(0.975, 16) * d.std(ddof=1) / math.sqrt(17)
    assert (found["low"], found["high"]) == pytest.approx((6 / 17 - half, 6 / 17 + half))
    same = paired_difference(Examples("mean", np.mean(after), after), Examples("mean", np.mean(after), after))
    assert (same["difference"], same["p"]) == (0.0, 1.0)
    brier = Examples("brier_score", 0.3, [(0, [0.5, 0.5]), (1, [0.2, 0.5, 0.3])])  # its samples are no numbers
    assert paired_difference(brier, brier) == {"difference": 0.0, "low": None, "high": None, "p": None}


def test_the_command_compares_models_on_the_same_examples(folder, examples, tmp_path, said):
    torch.manual_seed(1)
    model = load_causal_lm(str(folder))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    other = tmp_path / "other"
    model.save_pretrained(other)
    load_tokenizer(str(folder)).save_pretrained(other)
    names = [x for name in ("arc_easy", "lambada") for x in ("--task", str(examples / f"{name}.yaml"))]
    out = tmp_path / "tasks.json"
    code, text, _ = said("tasks", folder, other, *names, "--limit", 6, "--json", "--out", out)
    result = json.loads(text)
    assert code == 0 and result == json.loads(out.read_text())
    for place in (folder, other):
        alone, cost = tasks.run_tasks(place, names[1::2], limit=6)
        assert result["models"][str(place)] == alone and result["cost"][str(place)] == cost
    found = result["differences"][str(other)]["lambada_local"]
    values = [result["models"][str(p)]["lambada_local"]["answer_bits_per_byte"]["value"] for p in (folder, other)]
    assert found["answer_bits_per_byte"]["difference"] == pytest.approx(values[1] - values[0]) != 0
    assert set(result["differences"]) == {str(other)} and found["acc"]["p"] is not None
    code, text, _ = said("tasks", folder, other, *names, "--limit", 2)
    assert code == 0 and "lambada_local, 2 examples" in text and f"Numbers: {out}" not in text
    assert "minus" in text and folder.name in text
    for wrong, line in (
        ([folder, folder, *names], "a model is given twice"),
        ([folder, *names, "--out", tmp_path / "no" / "x.json"], "create it"),
        ([tmp_path / "nothing", *names], "no directory"),
    ):
        code, text, error = said("tasks", *wrong)
        assert code == 2 and line in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("models", "shown"),
    [
        (["runs/a/full/round-1/target", "runs/a/blade/round-1/target", "models/m.gguf"], ["full", "blade", "m.gguf"]),
        (["one/target", "two/target"], ["one", "two"]),
        (["a/seed-0/b/target", "a/seed-1/b/target", "a/seed-0/c/target"], ["seed-0/b", "seed-1/b", "seed-0/c"]),
        (["a/b/target", "b/a/target"], ["a/b/target", "b/a/target"]),  # no part tells them apart
        (["target", "a/target"], ["target", "a/target"]),
        (["hub/model"], ["model"]),
    ],
)
def test_models_that_end_alike_are_shown_by_what_they_do_not_share(models, shown):
    assert list(_short(models).values()) == shown


def test_a_narrow_terminal_cuts_no_name(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    models = ["runs/arm-with-a-long-name-0/target", "runs/arm-with-a-long-name-1/target"]
    figures = {"task": {"n": 3, "answer_bits_per_byte": {"value": 1.25, "stderr": 0.5}}}
    difference = {"task": {"answer_bits_per_byte": {"difference": -0.25, "low": -0.5, "high": 0.125, "p": None}}}
    result = {"models": dict.fromkeys(models, figures), "against": models[0], "differences": {models[1]: difference}}
    PlainConsole(soft_wrap=False).print(_tables(result))
    lines = capsys.readouterr().out.splitlines()
    columns = list(zip(*(line.split("│")[1:] for line in lines if "│" in line), strict=True))
    metric, model, value, minus, p = ("".join(cell.strip() for cell in column) for column in columns[:5])
    assert max(map(len, lines)) <= 60
    assert metric == "answer_bits_per_byte" and model == "arm-with-a-long-name-0arm-with-a-long-name-1"
    assert value.replace(" ", "") == 2 * "1.250±0.500" and minus.replace(" ", "") == "−0.250(−0.500to0.125)" and p == ""


TASK = "task: t\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood\ndoc_to_text: prompt\n"
DATA = "dataset_kwargs: {data_files: {test: d.jsonl}}\n"


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        ("- a\n", None, "is no task file of lm-eval"),
        ("task: t\ndoc_to_text: !function u.f\n", None, "!function is not allowed"),
        (TASK, None, "names no data"),
        (TASK + DATA, None, "no data file .*d.jsonl"),
        (
            TASK + DATA + "doc_to_target: response\n",
            '{"prompt": "a", "response": " b"}\n{"prompt"\n',
            "line 2 is not valid",
        ),
        (
            TASK + DATA + "doc_to_target: response\n",
            '{"prompt": "a"}\n{"response": " b"}\n',
            "line 2: expected .* prompt",
        ),
        (TASK + DATA + "doc_to_target: '{{respons}}'\n", '{"prompt": "a", "response": " b"}\n', "respons"),
        (
            TASK + DATA + "doc_to_target: '{{response.split()[1]}}'\n",
            '{"prompt": "a", "response": "b c"}\n{"prompt": "a", "response": "b"}\n',
            "no element 1",
        ),
        (TASK + DATA + "doc_to_taget: a\n", '{"prompt": "a", "response": " b"}\n', "doc_to_taget"),
    ],
)
def test_a_wrong_task_file_is_one_line(tmp_path, text, data, message):
    file = tmp_path / "t.yaml"
    file.write_text(text, encoding="utf-8")
    if data:
        (tmp_path / "d.jsonl").write_text(data, encoding="utf-8")
    with pytest.raises(BilectError, match=message) as error:
        tasks.find_tasks([str(file)])
    assert "\n" not in str(error.value)


def test_names_that_are_no_tasks_are_one_line(examples, monkeypatch):
    index = TaskManager(include_path=examples, include_defaults=False)  # lm-eval's own takes seconds to read
    monkeypatch.setattr(tasks, "_manager", lambda builtin: index)
    with pytest.raises(BilectError, match=r"lm-eval knows no task 'arc_esy_local'; did you mean 'arc_easy_local'\?"):
        tasks.find_tasks(["arc_esy_local"])
    with pytest.raises(BilectError, match=r"cannot read nothing.yaml: No such file"):
        tasks.find_tasks(["nothing.yaml"])
    with pytest.raises(BilectError, match="two tasks are called 'piqa_local'"):
        tasks.find_tasks([str(examples / "piqa.yaml")] * 2)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BilectError, match=r"pip install 'bilect\[eval\]'"):
        tasks.find_tasks([str(examples / "piqa.yaml")])


def test_the_network_is_left_alone(examples, monkeypatch):
    tried = []

    def refuse(*to, **_):
        tried.append(to)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert set(tasks.find_tasks([str(examples / "arc_easy.yaml")])) == {"arc_easy_local"} and not tried


def test_a_run_evaluates_its_models(examples, tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", 60)
    names = [str(examples / "arc_easy.yaml"), str(examples / "lambada.yaml")]
    values = tiny_settings(tmp_path / "corpus", tasks={"names": names, "limit": 6})
    for part in (*values["warmup"].values(), values["training"]):
        part |= {"steps": 2, "decay_steps": 1}
    values["fit"] |= {"steps": 1}
    out = tmp_path / "run"
    config = parse_config(values)
    summary = run(config, out)
    folders = {"warm": "warmup", "bliss": "round-1", "random": "controls/random/round-1"}
    assert set(summary["tasks"]) == set(folders)
    for arm, folder in folders.items():
        assert summary["tasks"][arm] == json.loads((out / folder / "tasks.json").read_text())
    alone, _ = tasks.run_tasks(out / "round-1" / "target-decayed", names, limit=6, context=48)
    assert alone == summary["tasks"]["bliss"] and alone["lambada_local"]["n"] == 6
    perplexity = alone["lambada_local"]["perplexity"]
    value = perplexity["value"]
    assert f">{measured(value, perplexity['stderr'])}<" in (out / "report.html").read_text(encoding="utf-8")
    screen = Console(file=io.StringIO(), width=200)
    screen.print(_tasks_table(summary["tasks"]))
    assert f"{value:,.1f} ± " in screen.file.getvalue()

    data, manifest = examples / "data" / "lambada.jsonl", json.loads((out / "run.json").read_text())
    before = data.read_text()

    def to_do(**changes):
        context = RunContext(out, parse_config({**values, **changes}), SilentProgress())
        plan = stages(context, input_hashes(context))
        return {name for name, done in states(plan, manifest).items() if not done}

    on_tasks = {"tasks warm", "round 1: tasks bliss", "round 1: tasks random"}
    assert all(manifest["stages"][name]["flops"] > 0 for name in on_tasks)
    assert to_do() == set() and to_do(tasks={"names": names, "limit": 5}) == on_tasks
    data.write_text(before.replace("zebra", "sun"))
    assert to_do() == on_tasks
    data.write_text(before)
    later = to_do(rounds=2)
    assert "round 2: tasks bliss" in later and "round 1: tasks bliss" not in later
    monkeypatch.setattr("bilect.pipeline.costs.PROBE_FLOPS", {"cpu": 1e7})
    assert next(p.flops for p in plan_run(config, out) if p.name == "tasks warm") == 0

    wrong = tmp_path / "wrong.yaml"
    text = (examples / "lambada.yaml").read_text(encoding="utf-8")
    wrong.write_text(text.replace("data/", f"{examples}/data/").replace("doc_to_target", "doc_to_taget"))
    with pytest.raises(BilectError, match="doc_to_taget"):
        run(parse_config({**values, "tasks": {"names": [str(wrong)]}}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
