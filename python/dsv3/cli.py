"""The command line: parse, call, print. Bad input is one line on stderr and exit code 2; a bug keeps its traceback."""

from __future__ import annotations

import errno
import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    help="Train and serve DeepSeek-V3 style models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# What the operating system says about paths and disks is the user's to mend, like a ValueError.
USER_ERRNO = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST})
DISK_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


def _show_version(wanted: bool) -> None:
    if wanted:
        from dsv3 import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def dsv3(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    """Train and serve DeepSeek-V3 style models."""


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help=".txt, .jsonl, .parquet or a folder")] = None,
    preset: Annotated[str | None, typer.Option(help="tiny or mini; by default what the machine can do")] = None,
    seconds: Annotated[float, typer.Option(help="of training")] = 240.0,
    out: Annotated[Path, typer.Option(help="folder for everything that is made")] = Path("runs/demo"),
) -> int:
    """Train a small DeepSeek-V3 on real text and generate from it."""
    from dsv3.demo import demo as run_demo

    return run_demo(data=data, preset=preset, seconds=seconds, out=out)


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.toml|.json] [KEY=VALUE]...",
            show_default=False,
            help="the keys of dsv3.train.TrainConfig, as preset=tiny data=runs/tokens out=runs/tiny max_steps=100",
        ),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="short for precision=: bf16, fp8 or fp32")] = None,
    ep: Annotated[int | None, typer.Option(help="short for ep=: ranks that share the experts, under torchrun")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest intact checkpoint")] = False,
) -> int:
    """Train a model, alone or under torchrun."""
    from rich.console import Console

    from dsv3.terminal import ShowProgress, command
    from dsv3.train import TrainConfig, run

    arguments = arguments or []
    files = [a for a in arguments if "=" not in a or (a.endswith((".toml", ".json")) and Path(a).is_file())]
    if len(files) > 1:
        raise ValueError(f"expected one config file and key=value overrides, found {' and '.join(files)}")
    overrides = [a for a in arguments if a not in files]
    overrides += [f"{key}={value}" for key, value in (("precision", precision), ("ep", ep)) if value is not None]
    config = TrainConfig.load(files[0] if files else None, overrides)
    shown = ShowProgress(Console(highlight=False))
    code = run(config, resume=resume, callbacks=[shown])
    if code == 0 and shown.last is not None:  # of the first rank
        last = f"step {shown.last.step}: loss {shown.last.ce:.3f}, {shown.last.bits_per_byte:.3f} bits/byte"
        out = Path(config.out)
        print(f"{last}; next: {command()} export {shlex.quote(str(out))} {shlex.quote(f'{out}-hf')}")
    return code


@app.command()
def tokenize(
    text: Annotated[Path | None, typer.Argument(help="text; the Python standard library if left out")] = None,
    out: Annotated[Path, typer.Option(help="token folder to write")] = Path("runs/tokens"),
    tokenizer: Annotated[Path | None, typer.Option(help="a tokenizer.json; otherwise one is trained")] = None,
    vocab_size: Annotated[int, typer.Option(help="of the tokenizer that is trained")] = 32000,
    split_rate: Annotated[float, typer.Option(help="share of punctuation + line break tokens to split")] = 0.0,
) -> None:
    """Turn text into a token folder that `dsv3 train` reads."""
    from dsv3.tokenizer import load_tokenizer
    from dsv3.train.corpus import open_corpus
    from dsv3.train.data import tokenize_corpus
    from dsv3.train.tokenizer import train_on_corpus

    loaded = load_tokenizer(tokenizer) if tokenizer else None
    corpus = open_corpus(text)
    index = tokenize_corpus(corpus, loaded or train_on_corpus(corpus, vocab_size), out, split_rate=split_rate)
    for name, split in index.splits.items():
        ratio = split.num_bytes / max(split.num_tokens, 1)
        print(f"{name}: {split.num_documents} documents, {split.num_tokens} tokens, {ratio:.2f} bytes each")
    others = f", {corpus.ignored} of other kinds left out" if corpus.ignored else ""
    print(f"{out}: vocabulary {index.vocab_size}, {len(corpus.skipped)} empty or non-UTF-8 files skipped{others}")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="checkpoint folder in the Hugging Face layout")],
    prompt: Annotated[str | None, typer.Argument(help="read from stdin if left out")] = None,
    max_tokens: Annotated[int, typer.Option()] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the best token")] = 0.8,
    top_p: Annotated[float, typer.Option()] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 keeps all")] = 0,
    min_p: Annotated[float, typer.Option(help="leaves out tokens less likely than this share of the likeliest")] = 0.0,
    seed: Annotated[int | None, typer.Option()] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends the completion; may be given again")] = None,
    speculative: Annotated[bool | None, typer.Option(help="draft with MTP; by default where there is one")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="by default the model folder's")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float32 or fp8; by default the file's")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp8 multiplies FP8 weights as they are, bf16 dequantises them; by default what suits"),
    ] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="fp8; by default that of the weights")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto is a GPU where there is one")] = "auto",
) -> None:
    """Continue a prompt, streaming; the speed goes to stderr."""
    import torch

    from dsv3 import DeepSeekV3, SamplingParams
    from dsv3.inference.cache import check_kv_cache_dtype
    from dsv3.inference.engine import engine_for
    from dsv3.parallel.data import find_device
    from dsv3.terminal import printable

    prompt = _standard_input() if prompt is None else prompt
    params = SamplingParams(max_tokens, temperature, top_p, top_k, seed, ignore_eos, tuple(stop or ()), min_p=min_p)
    if dtype not in (None, "bfloat16", "float32", "fp8"):
        raise ValueError(f"dtype must be bfloat16, float32 or fp8, found {dtype!r}")
    check_kv_cache_dtype(kv_cache_dtype)
    loaded = DeepSeekV3.from_pretrained(
        model, dtype=getattr(torch, dtype or "", dtype), device=find_device(device), precision=precision
    )
    options = {"speculative": speculative, "kv_cache_dtype": kv_cache_dtype}
    engine, prompts, each = engine_for(loaded, [prompt], params, tokenizer=tokenizer or model, **options)
    shown = False

    def show(index: int, ids: list[int], text: str) -> None:
        nonlocal shown
        shown = True
        print(printable(text), end="", flush=True)

    try:
        engine.generate(prompts, each, on_token=show)
    finally:
        if shown:  # also an error begins a line of its own
            print(flush=True)
    drafts = f", {engine.stats.acceptance_rate:.0%} of the drafts accepted" if engine.stats.drafted else ""
    print(
        f"[{engine.stats.generated_tokens} tokens, {engine.stats.tokens_per_second:.0f} a second{drafts}]",
        file=sys.stderr,
    )


def _standard_input() -> str:
    """All of it; what is not UTF-8 is said with the prompt, as where it is an argument."""
    return (
        sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
    )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a training checkpoint, or the folder of a run")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    ema: Annotated[bool, typer.Option("--ema", help="the averaged weights")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="folder; by default that of the training data")] = None,
) -> None:
    """Write a training checkpoint in the Hugging Face layout."""
    from dsv3.train import export as export_checkpoint

    export_checkpoint(checkpoint, out, ema=ema, tokenizer_dir=None if tokenizer is None else str(tokenizer))
    print(out)


@app.command()
def doctor() -> None:
    """Say what is installed and which ops run natively."""
    from dsv3.doctor import report

    report()


def main() -> NoReturn:
    """Entry point of `dsv3` and `python -m dsv3`."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    """Exit code of a command line."""
    usage_error = typer.BadParameter.__mro__[2]  # click's ClickException, wherever this version of typer keeps it
    try:
        return app(arguments or ["--help"], standalone_mode=False) or 0
    except usage_error as error:
        return _fail(error.format_message())
    except typer.Abort:
        return 130
    except ValueError as error:
        if not _is_ours(error):
            raise
        return _fail(str(error))
    except ImportError as error:
        if (error.name or "dsv3").split(".")[0] == "dsv3":
            raise
        return _fail(f"this needs a package that is not installed: {error.name}")
    except BrokenPipeError:
        return 1
    except OSError as error:
        if error.errno is None and _is_ours(error):
            return _fail(str(error))
        if error.errno not in USER_ERRNO | DISK_ERRNO:
            raise
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it, as a message to the user, rather than a library that was used wrongly."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == "dsv3"


def _fail(message: str) -> int:
    print("dsv3: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
