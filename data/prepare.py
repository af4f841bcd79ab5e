"""Public data sets -> the two kinds of JSON lines this repository reads.

    python -m data.prepare hh      --in hh-harmless-train --out hh.jsonl --valid hh-valid.jsonl
    python -m data.prepare hh      --in hh-harmless-train --out hh.jsonl --guard Meta-Llama-Guard-2-8B
    python -m data.prepare hh      --in hh-helpful-train  --out helpful.jsonl --helpful
    python -m data.prepare oasst   --in oasst1            --out oasst.jsonl
    python -m data.prepare prompts --in advbench strongreject my/xstest_prompts.csv --out prompts.jsonl

`--in` takes files (plain or gzipped), http(s) addresses, or the names in KNOWN below, as many as you like. Downloads
are kept beside --out (or in --cache), resumed if they broke off, and checked against a sha256 where one is known.
`--valid` holds out all rows of about 5% of the first questions. `python data/prepare.py` works as well.

hh       Anthropic HH-RLHF pairs -> {"prompt": […], "chosen": […], "rejected": […], "unsafe": true}: TRL's preference
         format and one flag. The flag says what the data set says: crowd workers found the rejected answer more harmful
         *than the chosen one*. It is no verdict: many rejected answers are harmless, some chosen ones are not.
         `--guard` keeps the pairs of which Llama Guard 2 says that rejected is unsafe and chosen is safe, and skips
         the others; it judges two answers a pair, one at a time, so give it a GPU. A run that is stopped starts anew.
         `--helpful` is for the helpful-* files: no flag, as the rejected answer is merely the less helpful one.
oasst    OpenAssistant trees -> the helpful half of the mix, without the flag. One row for every prompter message on a
         path that goes through the best-ranked replies only: chosen is the best reply, rejected the worst ranked one if
         two or more are ranked. Where nobody ranked the replies, the first is chosen and there is no rejected.
prompts  AdvBench, MaliciousInstructions, SimpleSafetyTests, StrongREJECT, XSTest, MT-Bench, told apart by their columns
         -> {"prompt": […], "set": "advbench", "benign": false, "target": "Sure, here is …"}, the source's "id" and
         "category" where it has them. MT-Bench rows hold the first turn in "prompt", both in "turns".

What does not fit is skipped whole, never repaired, and counted by reason on stderr. The same input gives the same
bytes. It will not shuffle, deduplicate, or cut to a length (see train.py --max-length), and needs only the standard
library; --guard alone imports the rest of this repository. The data have licences of their own; see the sources.
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from pathlib import Path

HH = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/"
OASST = "https://huggingface.co/datasets/OpenAssistant/oasst1/resolve/fdf72ae0827c1cda404aff25b6603abec9e3399b/"
GITHUB = "https://raw.githubusercontent.com/"
KNOWN = {
    "hh-harmless-train": HH + "harmless-base/train.jsonl.gz",
    "hh-harmless-test": HH + "harmless-base/test.jsonl.gz",
    "hh-helpful-train": HH + "helpful-base/train.jsonl.gz",
    "hh-helpful-test": HH + "helpful-base/test.jsonl.gz",
    "oasst1": OASST + "2023-04-12_oasst_ready.trees.jsonl.gz",
    "advbench": GITHUB + "llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv",
    "malicious_instructions": GITHUB + "vinid/safety-tuned-llamas/main/data/evaluation/I-MaliciousInstructions.json",
    "simple_safety_tests": GITHUB + "bertiev/SimpleSafetyTests/d7aee9a9422a5a5488f478fd79c2479c891c0f3b/"
    "SimpleSafetyTests%20-%20test%20cases.csv",
    "strongreject": GITHUB + "alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv",
    "xstest": GITHUB + "paul-rottger/xstest/main/xstest_prompts.csv",
    "mt_bench": GITHUB + "lm-sys/FastChat/main/fastchat/llm_judge/data/mt_bench/question.jsonl",
}
# Of the others the sum of what came is printed, for you to pin with --sha256.
SHA256 = {
    KNOWN["hh-harmless-test"]: "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    KNOWN["oasst1"]: "2a9a8fd343e9b28e04a895a669d3253f82d93e9c174d440199ae19d5fafbdff7",
    KNOWN["advbench"]: "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
    KNOWN["malicious_instructions"]: "7a2bc751d49983800848050282aa2a84b3faa7044c3178228c49dd68df7d679f",
    KNOWN["simple_safety_tests"]: "6d95a1301e0d0f3a3c4cf5392f4afff11ad6e3066f95d23aaa138d44aedf986c",
    KNOWN["strongreject"]: "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
    KNOWN["xstest"]: "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
    KNOWN["mt_bench"]: "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
}


def say(line):
    print(line, file=sys.stderr)


def fail(message):
    """Bad input ends here: one line that names the culprit and the way out, and exit code 2."""
    say("error: " + " ".join(str(message).split()))
    raise SystemExit(2)


def message(role, content):
    return {"role": role, "content": content}


# --- getting the bytes -----------------------------------------------------------------------------------------------


def locate(source, cache, sha256):
    """A file, an address or a known name -> the path of a file whose sha256, if one is known, is right."""
    if source in KNOWN and not Path(source).is_file():
        source = KNOWN[source]
    if not source.startswith(("http://", "https://")):
        if not Path(source).is_file():
            fail(f"{source}: no such file; --in takes files, http(s) addresses, and the names {', '.join(KNOWN)}")
        if sha256:
            check(source, sha256, "this is not the file that was meant")
        return Path(source)
    sha256 = sha256 or SHA256.get(source)
    # The hash keeps harmless-base/test.jsonl.gz and helpful-base/test.jsonl.gz apart.
    name = source.split("?")[0].rsplit("/", 1)[1]
    path = cache / f"{hashlib.sha256(source.encode()).hexdigest()[:8]}-{name}"
    if path.exists():
        say(f"{source}: already in {path}")
        check(path, sha256, "delete it and run again")
    else:
        cache.mkdir(parents=True, exist_ok=True)
        part = download(source, path)
        try:
            check(part, sha256, f"{source} changed or broke on the way; it was deleted; run again, or give --sha256")
        except SystemExit:
            part.unlink()
            raise
        part.replace(path)
    return path


def check(path, expected, advice):
    actual = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if expected is None:
        say(f"{path}: sha256 {actual}, not checked (pin it with --sha256)")
    elif actual != expected.lower():
        fail(f"{path}: sha256 is {actual}, not {expected.lower()}: {advice}")


def download(url, path):
    """Fetch url into PATH.part, going on where an earlier run broke off, and return that file once it is whole.

    If-Range (RFC 9110, 13.1.5) makes the server send the rest only if the file is still the same one, and everything
    otherwise, so two versions are never glued together. A server that gives no validator is asked for everything.
    """
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
    total = None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
            if response.status != 206:
                have = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise http.client.HTTPException("the server sent another part of the file than was asked for")
            say(f"{url}: downloading" + (f", resuming at byte {have}" if have else ""))
            etag = response.headers.get("ETag", "W/")  # W/: weak, not good enough for If-Range
            validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
            if "Content-Length" in response.headers:
                total = have + int(response.headers["Content-Length"])
            with open(part, "ab" if have else "wb") as file:
                # After open(), which empties an old part: a tag must never stand beside another version's bytes.
                tag.write_text(validator) if validator else tag.unlink(missing_ok=True)
                shutil.copyfileobj(response, file)
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: the last run stopped just before the rename, or worse
            tag.unlink()
            return download(url, path)
        fail(f"{url}: the server answers {error.code} {error.reason}; check the address or download the file by hand")
    except (OSError, ValueError, http.client.HTTPException) as error:
        fail(f"{url}: {error}; run the same command again to go on, or download the file by hand and give its path")
    if total is not None and part.stat().st_size != total:
        fail(f"{url}: lost after {part.stat().st_size} of {total} bytes; run the same command again to go on")
    tag.unlink(missing_ok=True)
    return part


def read_bytes(path):
    """The file's lines as bytes, unpacked if it is gzipped, whatever it is called."""
    try:
        with open(path, "rb") as raw:
            yield from gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error):
        fail(f"{path}: the gzip file is damaged or incomplete: get it again")


def read_json_lines(path):
    """(FILE:LINE, object) of every line. Split at \\n alone: U+2028 inside a text is no line end."""
    for number, line in enumerate(read_bytes(path), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            fail(f"{path}:{number}: not JSON ({error}): JSON lines are wanted, one object a line")
        if not isinstance(item, dict):
            fail(f"{path}:{number}: not a JSON object: JSON lines are wanted, one object a line")
        yield f"{path}:{number}", item


# --- hh --------------------------------------------------------------------------------------------------------------
# https://huggingface.co/datasets/Anthropic/hh-rlhf: two whole transcripts a line that differ in the last answer.

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
LABEL = re.compile(r"(?:^|\s)(?:Human|Assistant):")


def split_turns(transcript):
    """[("user", "Hi"), ("assistant", "Hello")] from \\n\\nHuman: Hi\\n\\nAssistant: Hello; else []."""
    before, *parts = SPEAKER.split(transcript)
    roles = ["user" if who == "Human" else "assistant" for who in parts[::2]]
    texts = [text.strip() for text in parts[1::2]]
    return list(zip(roles, texts, strict=True)) if roles[:1] == ["user"] and not before.strip() else []


def hh_reason(chosen, rejected):
    """Why this pair of turn lists cannot be used, or None. The first reason that holds counts."""
    for turns in (chosen, rejected):
        if not turns:  # text before the first label, no label at all, or the assistant speaks first
            return "does not begin with a Human turn"
        # Chat templates alternate (Gemma's raises otherwise). Joining the two turns would be guessing.
        if any(a[0] == b[0] for a, b in itertools.pairwise(turns)):
            return "one speaker has two turns in a row"
        if turns[-1][0] == "user":
            return "ends with a Human turn"
    (*prompt, (_, good)), (*other, (_, bad)) = chosen, rejected
    if prompt != other:  # among others: one answer goes on to write the human's next turn itself
        return "chosen and rejected have different prompts"
    if not all(text for _, text in prompt):
        return "empty turn in the prompt"
    if not good or not bad:
        return "empty answer"
    if good == bad:
        return "chosen and rejected are the same"
    # "Human: So you agree …" as an answer: the model that wrote it lost track of who is speaking. Do not teach that.
    if LABEL.search(good) or LABEL.search(bad):
        return "speaker label inside an answer"
    return None


def hh_rows(path, unsafe):
    """(row, None) or (None, reason) for every pair."""
    for place, pair in read_json_lines(path):
        if not all(isinstance(pair.get(side), str) for side in ("chosen", "rejected")):
            fail(f'{place}: no HH-RLHF pair, which has the strings "chosen" and "rejected": is it another data set?')
        chosen, rejected = split_turns(pair["chosen"]), split_turns(pair["rejected"])
        if reason := hh_reason(chosen, rejected):
            yield None, reason
            continue
        row = {
            "prompt": [message(*turn) for turn in chosen[:-1]],
            "chosen": [message(*chosen[-1])],
            "rejected": [message(*rejected[-1])],
        }
        yield row | ({"unsafe": True} if unsafe else {}), None


def load_guard(directory, device, dtype):
    """The judge. Imported here and nowhere else: all other conversions run where there is no PyTorch."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python data/prepare.py`
    try:
        import torch

        from backtrack.judge import load_judge
        from model.errors import InputError
        from model.errors import device as known_device
    except ImportError as error:
        fail(f"--guard: {error}: it needs this repository's environment, see README.md")
    if not Path(directory).is_dir():
        fail(f"--guard {directory}: no such directory: download Llama Guard 2, then name the directory it is in")
    cuda = torch.cuda.is_available()
    try:
        device = known_device(device or ("cuda" if cuda else "cpu"))
        return load_judge(directory, device, getattr(torch, dtype or ("bfloat16" if cuda else "float32")))
    except (InputError, argparse.ArgumentTypeError) as error:
        fail(f"--guard: {error}")


def guarded(rows, judge):
    """hh_rows' pairs once more, those skipped that the guard does not find to be safe against unsafe."""
    from model.errors import InputError  # here, as in load_guard

    rows = list(rows)  # all read before hours are spent on the first: a bad line shows now, and the time left is known
    total, judged, began, reported = sum(row is not None for row, _ in rows), 0, time.monotonic(), -math.inf
    for row, reason in rows:
        if row is None:
            yield None, reason
            continue
        try:
            if judge(row["prompt"], row["chosen"][0]["content"]).unsafe:
                reason = "chosen is unsafe, says the guard"
            elif not judge(row["prompt"], row["rejected"][0]["content"]).unsafe:
                reason = "rejected is safe, says the guard"
        except InputError as error:  # a conversation beyond its context, or an answer that is no verdict
            reason = "no verdict of the guard"
            say(f"guard: {error}")
        judged += 1
        now = time.monotonic()
        if now - reported >= 30 or judged == total:
            reported, left = now, (now - began) / judged * (total - judged)
            say(f"guard: {judged} of {total} pairs judged, {left / 60:.0f} minutes left")
        yield (None, reason) if reason else (row, None)


# --- oasst -----------------------------------------------------------------------------------------------------------
# https://huggingface.co/datasets/OpenAssistant/oasst1: one tree a line, messages nested in "replies". "rank" 0 is best.


def walk(place, root):
    """Every message of the tree, checked for form, so that nothing below needs to check."""
    stack = [root]
    while stack:
        node = stack.pop()
        if not (
            isinstance(node, dict)
            and isinstance(node.get("text"), str)
            and node.get("role") in ("prompter", "assistant")
            and isinstance(node.get("rank"), int | None)
            and isinstance(node.get("replies") or [], list)
        ):
            fail(f"{place}: no OpenAssistant tree: take a file named like *_ready.trees.jsonl.gz, not *.messages.*")
        yield node
        stack += node.get("replies") or []


def oasst_reason(node, lang):
    if node.get("deleted"):
        return "deleted"
    if node.get("review_result", True) is not True:  # null: nobody has reviewed it
        return "did not pass review"
    if lang != "all" and node.get("lang") != lang:
        return f"language is not {lang}"
    if not node["text"].strip():
        return "empty"
    return None


def oasst_rows(path, lang, left_out):
    """(row, None) or (None, reason) for every prompter message; dropped replies are counted in left_out."""
    for place, tree in read_json_lines(path):
        prompters = sum(node["role"] == "prompter" for node in walk(place, tree.get("prompt")))
        ready = tree.get("tree_state", "ready_for_export") == "ready_for_export"
        stack = [(tree["prompt"], [])] if ready else []
        while stack:
            node, before = stack.pop()
            if node["role"] != "prompter":
                left_out["role out of turn"] += 1
                continue
            prompters -= 1
            replies = []
            if not (reason := oasst_reason(node, lang)):
                for reply in node.get("replies") or []:
                    if reply["role"] == "assistant":
                        why = oasst_reason(reply, lang)
                        left_out.update([why] if why else [])
                        replies += [] if why else [reply]
                if not replies:
                    reason = "no usable reply"
            if reason:
                yield None, reason
                continue
            replies.sort(key=lambda reply: math.inf if reply.get("rank") is None else reply["rank"])  # stable
            ranked = [reply for reply in replies if reply.get("rank") is not None]
            best = replies[0]
            row = {
                "prompt": [*before, message("user", node["text"].strip())],
                "chosen": [message("assistant", best["text"].strip())],
            }
            worst = ranked[-1] if ranked else best
            if worst["text"].strip() != best["text"].strip():
                row["rejected"] = [message("assistant", worst["text"].strip())]
            yield row, None
            stack += [(child, row["prompt"] + row["chosen"]) for child in reversed(best.get("replies") or [])]
        for _ in range(prompters):
            yield None, "not on a path of best replies" if ready else "tree is not ready for export"


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt_rows(path):
    """(row, None) or (None, reason) for every prompt of one of the six sets."""
    try:
        text = b"".join(read_bytes(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path}: not UTF-8 text ({error}): get the original file again")
    try:
        item = json.loads(text)
    except (ValueError, RecursionError):
        item = None
    if isinstance(item, dict) and "instructions" in item:
        prompts = malicious_prompts(path, item)
    else:
        prompts = mt_bench_prompts(path) if text.lstrip().startswith("{") else csv_prompts(path, text)
    for prompt, name, benign, extra in prompts:
        if prompt.strip():
            yield {"prompt": [message("user", prompt.strip())], "set": name, "benign": benign, **extra}, None
        else:
            yield None, "empty prompt"


def csv_prompts(path, text):
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = set(lines.fieldnames or [])
        for line in lines:
            place = f"{path}:{lines.line_num}"
            if None in line or None in line.values():
                fail(f"{place}: {len(lines.fieldnames)} columns expected: get the original file again")
            if {"goal", "target"} <= columns:  # https://github.com/llm-attacks/llm-attacks
                yield line["goal"], "advbench", False, {"target": line["target"].strip()}
            elif {"prompts_final", "id", "harm_area"} <= columns:  # https://github.com/bertiev/SimpleSafetyTests
                extra = {"id": line["id"], "category": line["harm_area"]}
                yield line["prompts_final"], "simple_safety_tests", False, extra
            elif {"forbidden_prompt", "category"} <= columns:  # https://github.com/alexandrasouly/strongreject
                yield line["forbidden_prompt"], "strongreject", False, {"category": line["category"]}
            elif {"prompt", "id", "type", "label"} <= columns:  # https://github.com/paul-rottger/xstest
                if line["label"] not in ("safe", "unsafe"):
                    fail(f"{place}: label {line['label']!r} is neither safe nor unsafe: get the original file again")
                # The unsafe ones are contrasts: they look like the safe ones and are to be refused.
                yield line["prompt"], "xstest", line["label"] == "safe", {"id": line["id"], "category": line["type"]}
            else:
                fail(f"{path}: columns {', '.join(lines.fieldnames)} of no known set: see --help for the six it knows")
    except csv.Error as error:
        fail(f"{path}:{lines.reader.line_num}: not CSV ({error}): get the original file again")


def malicious_prompts(path, item):
    """https://github.com/vinid/safety-tuned-llamas: one object, the texts in one list, their tags in another."""
    texts, tags = item["instructions"], item.get("tags")
    lists = isinstance(texts, list) and isinstance(tags, list) and len(texts) == len(tags)
    if not (lists and all(isinstance(text, str) for text in texts)):
        fail(f'{path}: "instructions" and "tags" are not two lists of one length: get the original file again')
    for text, tag in zip(texts, tags, strict=True):
        yield text, "malicious_instructions", False, {"category": tag}


def mt_bench_prompts(path):
    """https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge: question_id, so that its judge finds answers."""
    for place, item in read_json_lines(path):
        turns = item.get("turns")
        texts = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if not texts or "question_id" not in item:
            fail(f'{place}: no MT-Bench question, which has "question_id" and "turns": see --help for the six sets')
        extra = {"question_id": item["question_id"], "category": item.get("category")}
        extra["turns"] = [turn.strip() for turn in turns]
        yield turns[0], "mt_bench", True, extra


# --- writing ---------------------------------------------------------------------------------------------------------


def held_out(row, percent):
    """By hash of the first user message: all rows of one conversation, or of one question, go to the same side."""
    digest = hashlib.sha256(row["prompt"][0]["content"].encode()).hexdigest()
    return int(digest[:8], 16) / 2**32 * 100 < percent


def write(rows, outputs, percent, limit):
    """Write rows to outputs[0], held-out ones to outputs[1] if there is one. Return counts: written, skipped by reason.

    Everything goes to temporary files first, renamed when complete: a target holds its old content or all of the new.
    """
    written, skipped = [0] * len(outputs), Counter()
    drafts = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in outputs]
    try:
        with contextlib.ExitStack() as stack:
            raw = [stack.enter_context(open(draft, "wb")) for draft in drafts]
            files = [
                # No name and no time in the header: same rows, same bytes.
                stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0)) if path.suffix == ".gz" else file
                for path, file in zip(outputs, raw, strict=True)
            ]
            for row, reason in rows:
                if row is not None:
                    try:
                        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                    except UnicodeEncodeError:
                        row, reason = None, "broken Unicode (half a surrogate pair)"
                if row is None:
                    skipped[reason] += 1
                    continue
                side = int(len(outputs) == 2 and held_out(row, percent))
                files[side].write(line)
                written[side] += 1
                if sum(written) == limit:
                    break
        if not sum(written):
            return written, skipped
        for draft, path in zip(drafts, outputs, strict=True):
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            draft.replace(path)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    return written, skipped


def arguments():
    parser = argparse.ArgumentParser(prog="data.prepare", description="Public data sets -> JSON lines for backtrack.")
    about = {"epilog": __doc__.split("\n\n", 3)[3], "formatter_class": argparse.RawDescriptionHelpFormatter}
    commands = parser.add_subparsers(dest="command", required=True)
    hh = commands.add_parser("hh", help="Anthropic HH-RLHF pairs", **about)
    oasst = commands.add_parser("oasst", help="OpenAssistant trees", **about)
    prompts = commands.add_parser("prompts", help="safety sets, XSTest and MT-Bench, for evaluation", **about)
    for command in (hh, oasst, prompts):
        command.add_argument("--in", dest="inputs", nargs="+", required=True, metavar="FILE|URL|NAME")
        command.add_argument("--out", type=Path, required=True, help="JSON lines; gzipped if it ends in .gz")
        command.add_argument("--limit", type=int, help="stop after this many rows (a quick try)")
        command.add_argument("--cache", type=Path, help="where downloads are kept (default: beside --out)")
        command.add_argument("--sha256", help="what the one input must hash to")
    for command in (hh, oasst):
        command.add_argument("--valid", type=Path, help="hold rows out into this file")
        command.add_argument("--valid-percent", type=float, default=5.0, help="how many, about (default: 5)")
    hh.add_argument("--helpful", action="store_true", help='the helpful-* files: rows get no "unsafe" flag')
    hh.add_argument("--guard", metavar="DIR", help="Llama Guard 2: keep pairs of a safe chosen and an unsafe rejected")
    hh.add_argument("--device", help="where the guard runs (default: cuda if there is one, else cpu)")
    hh.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the guard (default: bfloat16 on cuda)")
    oasst.add_argument("--lang", default="en", help="language tag, or all (default: en)")
    prompts.set_defaults(valid=None, valid_percent=1.0)
    return parser.parse_args()


def convert(args):
    if args.limit is not None and args.limit < 1:
        fail("--limit is at least 1")
    if not 0 < args.valid_percent < 100:
        fail("--valid-percent lies between 0 and 100")
    if args.sha256 and len(args.inputs) != 1:
        fail("--sha256 goes with exactly one --in")
    if args.command == "hh" and args.guard and args.helpful:
        fail("--guard goes without --helpful: it looks for rejected answers that are unsafe")
    outputs = [args.out] + ([args.valid] if args.valid else [])
    for path in outputs:
        if path.exists() and not path.is_file():
            fail(f"{path}: not an ordinary file: name one to write to")
        path.parent.mkdir(parents=True, exist_ok=True)
    paths = [locate(source, args.cache or args.out.parent, args.sha256) for source in args.inputs]
    inputs, targets = {path.resolve() for path in paths}, {path.resolve() for path in outputs}
    if inputs & targets or len(targets) < len(outputs):
        fail(f"{', '.join(map(str, outputs))}: read or written twice: name another file to write to")

    left_out = Counter()
    if args.command == "hh":
        if not args.helpful and any("helpful-" in source for source in args.inputs):
            say("note: this looks like a helpful-* file; without --helpful its rejected answers are marked unsafe")
        unit, rows = "pairs", (row for path in paths for row in hh_rows(path, unsafe=not args.helpful))
        if args.guard:
            rows = guarded(rows, load_guard(args.guard, args.device, args.dtype))
    elif args.command == "oasst":
        unit, rows = "prompter messages", (row for path in paths for row in oasst_rows(path, args.lang, left_out))
    else:
        unit, rows = "prompts", (row for path in paths for row in prompt_rows(path))
    written, skipped = write(rows, outputs, args.valid_percent, args.limit)

    total, lost = sum(written), sum(skipped.values())
    say(f"{args.command}: {total + lost} {unit} read, {total} rows written, {lost} skipped")
    for path, count in zip(outputs, written, strict=True):
        say(f"  {count:7d}  written to {path}")
    for label, counts in (("skipped", skipped), ("replies left out", left_out)):
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            say(f"  {count:7d}  {label}: {reason}")
    if not total:
        fail(f"{', '.join(map(str, paths))}: no usable row, so nothing was written: is this the right command?")


def main():
    args = arguments()
    try:
        convert(args)
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
