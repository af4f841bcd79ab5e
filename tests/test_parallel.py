"""Several processes against one: the same losses, weights, resets of a resumed run, and one line when something fails.

One process is the oracle. Processes are forks (ranks.py); that torchrun starts them alike is seen once, by torchrun.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import command
from models import FAMILIES, LLAMA, network_of
from ranks import Ranks, trained_on
from safetensors.torch import load_file
from samples import row_of, toy_tokenizer, user, write
from training import contents, metrics, steps_of, trained

import sample
import train
from backtrack.evaluate import __main__ as evaluate
from backtrack.run import chunks, launch, parallel, progress
from backtrack.trees import Tree
from model import Transformer, load_model, save_model

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"llama": LLAMA, "llama-untied": LLAMA | {"tie_word_embeddings": False}, "gemma": FAMILIES["gemma"]}
# Counted in ranks of their own, so they may differ.
OF_RANKS = ("seconds", "tokens_per_s", "computed_tokens")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """rows.jsonl, twelve rows of different lengths; and NAME, a random model with the toy's tokenizer, for each."""
    root, rows = tmp_path_factory.mktemp("world"), []
    for i in range(12):
        texts = (f"Hi {i} " * (1 + i % 4), f"no word{i} " * (1 + i % 3), f"yes other{i} " * (1 + i % 5))
        rows.append(row_of(*texts, unsafe=i % 2 == 0))
    write(root / "rows.jsonl", *rows)
    write(root / "corpus.jsonl", *({"text": f"word{i} other{i} thing{i * i}. " * 9} for i in range(9)))
    for name, fields in MODELS.items():
        save_model(network_of(fields, scale=0.1), root / name, tokenizer=toy_tokenizer())
    return root


def words(world, command, out, *more, model="llama"):
    start = ["--init", world / model, "--data", world / "rows.jsonl", "--heldout", world / "rows.jsonl"]
    if command == "base":
        start = ["--config", world / model / "config.json", "--tokenizer", world / model]
        start += ["--data", world / "corpus.jsonl"]
    sizes = ["--max-length", 96 if command != "base" else 16, "--batch-size", 2, "--grad-accum", 2]
    steps = ["--steps", 4, "--lr", 1e-3, "--log-every", 1, "--save-every", 2]
    return [command, *start, *sizes, *steps, "--device", "cpu", "--out", out, *more]


def same_result(a, b, tolerance=1e-5):
    """The same weights and the same log."""
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).norm() <= tolerance * weight.norm(), name
    for record, other in zip(metrics(a), metrics(b), strict=True):
        assert record.keys() == other.keys()
        for name in record.keys() - set(OF_RANKS):
            assert other[name] == pytest.approx(record[name], rel=tolerance, abs=1e-5), name


# ── The same numbers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def alone(world):
    """(command, model) -> the directory that one process has made; each is made once."""

    def out(command, model="llama", *more):
        directory = world / f"one-{command}-{model}-{len(more)}"
        if not directory.exists():
            trained(*words(world, command, directory, *more, model=model))
        return directory

    return out


# Ranks, command, model, flags; flags of the ranks alone; tolerance.
CASES = {
    "base": (2, "base", "gemma", [], [], 1e-5),
    "a few logits at a time": (2, "dpo", "llama-untied", [], [], 1e-5),
    "what saves memory": (2, "sft", "llama", [], ["--offload", "--checkpoint-activations"], 1e-5),
    "ranks without rows": (3, "dpo", "llama", ["--batch-size", 1, "--grad-accum", 1], [], 1e-5),
    # Blocks gathered in bf16 round the gains of their norms, and nothing else.
    "bf16": (2, "sft", "llama", ["--dtype", "bfloat16", "--steps", 2], [], 0.02),
}
SLOW = {
    f"{n} {command} {m}": (n, command, m, [], [], 1e-5) for n in (1, 4) for command in ("sft", "dpo") for m in MODELS
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_ranks_reach_what_one_process_reaches(world, tmp_path, alone, monkeypatch, case):
    """Losses, gradient norms, held-out losses and weights; dpo's reference too, which its margins hang on."""
    n, command, model, more, of_ranks, tolerance = (CASES | SLOW)[case]
    one = alone(command, model, *more)
    if "logits" in case:
        monkeypatch.setattr(chunks, "LOGITS", 5 * 1024)
    trained_on(n, *words(world, command, tmp_path / "out", *more, *of_ranks, model=model))
    same_result(one, tmp_path / "out", tolerance)
    assert contents(tmp_path / "out").keys() == contents(one).keys()


def test_rows_are_shared_out_by_tokens(monkeypatch):
    """Every row once; equal work where that can be; in as few micro-batches as there can be."""
    draw = random.Random(0)
    for _ in range(50):
        n, size, count = draw.randint(1, 8), draw.randint(1, 4), draw.randint(1, 40)
        trees = [Tree([str(i)], 1.0, tokens=[0] * draw.randint(1, 90)) for i in range(count)]
        monkeypatch.setattr(parallel, "size", lambda n=n: n)
        shares = []
        for r in range(n):
            monkeypatch.setattr(parallel, "rank", lambda r=r: r)
            mine, rounds = parallel.share_out(trees, size)
            shares.append(mine)
            assert rounds == -(-count // (size * n)) and len(mine) <= rounds * size
        assert sorted(int(tree.names[0]) for share in shares for tree in share) == list(range(count))
        work = [sum(map(len, share)) for share in shares]
        if count >= 4 * n and size * n * rounds > count + n:  # room to choose
            assert max(work) - min(work) <= 90


# ── Save and resume ──────────────────────────────────────────────────────────────────────────────────────────────────


def broken_off(n, victim, arguments, before):
    """A run in which one rank is killed: the others end too, with one line."""

    def impatient(rank):  # the killed one will never say why
        within = launch.within
        launch.within = lambda seconds, is_so: within(seconds / 10, is_so)
        before(rank)

    ranks = Ranks(n, train.main, arguments, impatient)
    codes, said = ranks.codes(), ranks.said()
    ranks.file.unlink()
    assert codes[victim] == -signal.SIGKILL and set(codes[:victim] + codes[victim + 1 :]) == {1}, (codes, said)
    assert "Traceback" not in said and said.count("error: ") == 1 and "killed" in said.splitlines()[-1], said


def test_a_killed_rank_ends_all_and_the_run_goes_on(world, tmp_path, alone):
    """Rank 1 is killed in step 4. The run then ends with the bits of the unbroken one."""
    out = tmp_path / "out"

    def before(rank):
        rate = train.learning_rate

        def learning_rate(step, *more):
            if step == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return rate(step, *more)

        train.learning_rate = learning_rate

    broken_off(2, 1, words(world, "sft", out), before)
    assert json.loads((out / "training.json").read_text())["step"] == 2 and (out / "optimizer.state").exists()
    assert "resuming after step 2" in trained_on(2, *words(world, "sft", out, "--resume"))
    trained_on(2, *words(world, "sft", tmp_path / "whole"))
    assert contents(out)["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]
    assert steps_of(out) == steps_of(tmp_path / "whole")
    same_result(alone("sft"), out)


def test_a_rank_that_is_killed_before_they_meet_ends_all(world, tmp_path):
    """Two wait for rank 1 until torchrun sends them SIGTERM, and one of them says why they end."""

    def before(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    ranks = Ranks(3, train.main, words(world, "sft", tmp_path / "out"), before)
    os.waitid(os.P_PID, ranks.pids[1], os.WEXITED | os.WNOWAIT)
    time.sleep(2)  # they wait in C++ by now
    for rank in (0, 2):
        os.kill(ranks.pids[rank], signal.SIGTERM)
    codes, said = ranks.codes(20), ranks.said()
    ranks.file.unlink()
    assert codes == [1, -signal.SIGKILL, 1], (codes, said)
    assert said == "error: a rank was killed before all had met; start them again\n"


def test_a_save_that_is_killed_leaves_the_last_one(world, tmp_path, alone):
    """Rank 0 is killed while it writes the second save: all is that of the first, and more ranks can go on with it."""
    out = tmp_path / "out"

    def before(rank):
        write_tensors = progress.write_tensors

        def killed(tensors, file, *more):
            if rank == 0 and file.name == "optimizer.state" and (out / "config.json").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            write_tensors(tensors, file, *more)

        progress.write_tensors = killed

    broken_off(2, 0, words(world, "sft", out, "--save-every", 1), before)
    assert json.loads((out / "training.json").read_text())["step"] == 1 and load_model(out)
    trained_on(3, *words(world, "sft", out, "--save-every", 1, "--resume"))
    same_result(alone("sft"), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ── Faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_word(flag, value):
    """On rank 1 alone the flag has another value."""

    def before(rank):
        if rank == 1:
            sys.argv[sys.argv.index(flag) + 1] = str(value)

    return before


def test_what_is_wrong_is_said_once(world, tmp_path):
    """On all ranks, or on one of them."""
    bad = write(tmp_path / "bad.jsonl", row_of("Hi", "no"), {"prompt": 1})
    less = write(tmp_path / "less.jsonl", row_of("Hi", "no", "yes", unsafe=True))
    out, strangers = tmp_path / "out", tmp_path / "strangers"
    strangers.mkdir()
    (strangers / "x").touch()
    for arguments, before, expected in (
        (["--data", bad], None, "bad.jsonl:2: "),
        (["--lr", "x"], None, "--lr"),
        (["--out", strangers], None, "holds files but no checkpoint"),  # rank 0 alone looks there
        ([], with_word("--lr", 0.002), "error: rank 1 has lr = 0.002, rank 0 has 0.001"),
        ([], with_word("--data", less), "error: rank 1 has data = "),
    ):
        said = trained_on(2, *words(world, "sft", out, *arguments), code=2, before=before or (lambda rank: None))
        assert expected in said.splitlines()[-1]


def test_trouble_of_one_rank_ends_all(world, tmp_path):
    """Out of memory on rank 1: the same line and code as if it had been rank 0."""

    def full(rank):
        if rank == 1:
            train.make_batch = lambda *a: (_ for _ in ()).throw(MemoryError("out of memory"))

    said = trained_on(2, *words(world, "sft", tmp_path / "out"), code=2, before=full)
    assert said.splitlines()[-1] == "error: rank 1: out of memory"


def test_who_needs_torchrun_and_who_refuses_it(world, tmp_path):
    said = trained_on(2, "--ckpt", world / "llama", "--prompt", "Hi", code=2, main=sample.main)
    assert said == "error: this program runs in one process; start it without torchrun\n"
    assert "torchrun" in trained(*words(world, "sft", tmp_path / "out", "--offload"), code=2)


def typed(n, words):
    """The command as it is typed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "train.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_torchrun_itself(world, tmp_path, alone):
    typed(2, words(world, "sft", tmp_path / "out"))
    same_result(alone("sft"), tmp_path / "out")


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_logits_in_chunks(world, tmp_path, alone, monkeypatch):
    """A few places at a time: never more logits at once than LOGITS, and the same result."""
    whole, seen, real = alone("base", "gemma"), [], Transformer.logits

    def logits(self, hidden):
        seen.append(hidden.shape[:-1].numel())
        return real(self, hidden)

    monkeypatch.setattr(chunks, "LOGITS", 5 * 1024)
    monkeypatch.setattr(Transformer, "logits", logits)
    trained(*words(world, "base", tmp_path / "out", model="gemma"))
    same_result(whole, tmp_path / "out")
    assert 0 < max(seen) <= 5


# ── What fits where ──────────────────────────────────────────────────────────────────────────────────────────────────

# 20 million parameters, enough that Python's own memory does not blur them.
WIDE = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512}


def planned(capsys, *words):
    """The table that --plan prints, in GB: name -> size; and all of it."""
    trained(*words)
    said = capsys.readouterr().out
    return {name.strip(): float(size) for name, size in re.findall(r"^  (.*?) +([\d.]+) GB", said, re.M)}, said


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: peaks of memory cannot be read")
@pytest.mark.parametrize("family, number", [("llama", 0), ("llama", 4), ("gemma", 0), ("gemma", 2)])
@pytest.mark.parametrize("more", [[], ["--checkpoint-activations"]])
def test_the_plan_is_what_is_measured(tmp_path, capsys, family, number, more):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[family] | WIDE))
    toy_tokenizer().save(tmp_path)
    data = write(tmp_path / "corpus.jsonl", {"text": " ".join(str(i * i) for i in range(3000))})
    words = ["base", "--config", tmp_path / "config.json", "--tokenizer", tmp_path, "--data", data, "--device", "cpu"]
    words += ["--out", tmp_path / "out", "--steps", 3, "--max-length", 256, "--batch-size", 4]
    words = [*map(str, [*words, "--grad-accum", max(1, number), *more])]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "tests.peak", str(number), *words]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=env)
    measured = int(re.search(r"peak (\d+)", done.stdout + done.stderr)[1])
    plan, _ = planned(capsys, *words, "--plan", max(1, number))
    assert 1e9 * plan["total per device"] == pytest.approx(measured, rel=0.2)


def test_the_plan_of_llama_3_8b(tmp_path, capsys):
    """Sums that can be done by hand: 16 bytes a parameter over the devices, 4 with LoRA and its factors beside."""
    shape = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | shape | {"max_position_embeddings": 8192}))
    words = ("sft", "--init", tmp_path, "--out", tmp_path / "out", "--max-length", 512, "--batch-size", 1, "--plan")
    eight, said = planned(capsys, *words, 8)
    assert said.startswith("8,030,261,248 parameters on 8 devices")
    assert eight["weights, fp32"] == eight["gradients, fp32"] == round(8.030261248 / 2, 3)
    assert eight["moments, fp32"] == round(8.030261248, 3)
    one, _ = planned(capsys, *words, 1)
    kept = one["total per device"] - one["activations"] + one["with --checkpoint-activations"]
    assert planned(capsys, *words, 1, "--checkpoint-activations")[0]["total per device"] == pytest.approx(
        kept, abs=2e-3
    )
    # Rank 16: 16 numbers for each row and each column of seven matrices in 32 blocks, and of the head.
    factors = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) / 1e9
    factors += 16 * (128256 + 4096) / 1e9
    low, _ = planned(capsys, *words, 1, "--lora", 16)
    assert low["gradients, fp32"] == pytest.approx(4 * factors, abs=1e-3)
    assert low["weights, fp32"] == pytest.approx(4 * (8.030261248 + factors), abs=1e-3)
    assert not (tmp_path / "out").exists()


# ── Evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prompts_are_shared_out(world, tmp_path):
    """Three ranks give the answers and the summary of one process; begun by two, one process and three go on."""
    prompts = [{"prompt": user(f"Hi {i} " * (1 + i % 3)), "set": "ab"[i % 2]} for i in range(11)]
    write(tmp_path / "prompts.jsonl", *prompts)

    def evaluated(out, n, *more):
        arguments = ["--ckpt", world / "llama", world / "gemma", "--prompts", tmp_path / "prompts.jsonl"]
        arguments += ["--out", out, "--device", "cpu", "--max-new-tokens", 6, "--batch-size", 2, "--temperature", 1.0]
        arguments = [*arguments, "--samples", 2, *more]
        command(evaluate.main, *arguments) if n == 0 else trained_on(n, *arguments, main=evaluate.main)
        result = json.loads(out.read_text())
        lines = out.with_suffix(".answers.jsonl").read_text().splitlines()[1:]
        answers = {(a["checkpoint"], a["prompt"], a["sample"]): a["response"] for a in map(json.loads, lines)}
        assert len(answers) == len(lines) == 2 * 2 * 11
        return answers, [(r["checkpoint"], r["set"], r["reset"]) for r in result["records"]]

    one = evaluated(tmp_path / "one.json", 0)
    assert evaluated(tmp_path / "three.json", 3) == one
    file = tmp_path / "three.answers.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:9]))
    assert evaluated(tmp_path / "three.json", 2) == one
    assert trained_on(2, "--ckpt", world / "llama", code=2, main=evaluate.main).endswith("--ckpt needs --prompts\n")


# ── On CUDA ──────────────────────────────────────────────────────────────────────────────────────────────────────────

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: NCCL and memory are not tested")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("more", [[], ["--checkpoint-activations"], ["--offload"], ["--lora", 4]])
def test_nccl_reaches_what_one_device_reaches(world, tmp_path, more):
    """On as many GPUs as there are, one included; sums on a GPU come in another order, so not to 1e-5."""
    plain = [word for word in more if word not in ("--offload", "--checkpoint-activations")]
    trained(*words(world, "sft", tmp_path / "one", *plain, "--device", "cuda"))
    typed(torch.cuda.device_count(), words(world, "sft", tmp_path / "all", *more, "--device", "cuda"))
    same_result(tmp_path / "one", tmp_path / "all", tolerance=1e-3)


@pytest.mark.gpu
@needs_cuda
def test_compiled_on_cuda(world, tmp_path):
    """The compiler's kernels add in another order: the losses of the first steps agree to a thousandth."""
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        trained(*words(world, "sft", tmp_path / name, "--device", "cuda", *flags))
    plain, compiled = ([r["loss"] for r in metrics(tmp_path / name)[::2]] for name in ("plain", "compiled"))
    assert len(plain) == 4 and compiled == pytest.approx(plain, rel=1e-3)
