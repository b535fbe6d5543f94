"""The training loop. A step is issued without waiting for the device; what it did reaches the host a step later."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dsv3.comm.alive import naming_lost_ranks
from dsv3.model import Batch, DeepSeekV3
from dsv3.parallel.data import DataParallel, ranks_share_gpus
from dsv3.train import checkpoint
from dsv3.train.balance import ExpertBias
from dsv3.train.buffers import ParamBuffers
from dsv3.train.config import TrainConfig
from dsv3.train.data import BatchReader, ValidationSet
from dsv3.train.ema import Ema
from dsv3.train.gradients import Gradients, why_no_graphs
from dsv3.train.metrics import Callback, EvalReport, StepReport
from dsv3.train.optimizer import AdamW


class Diverged(RuntimeError):
    """Too many steps in a row were not finite."""


class Trainer:
    """Trains `model` (on its device, in its dtype) as `config` says, with this rank's batches from `reader`.

    After construction the parameters are views of flat buffers. `resume` or `start_from` load a checkpoint; `train`
    runs to the end. Only the first rank calls the callbacks and prints.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        config: TrainConfig,
        reader: BatchReader,
        *,
        validation: ValidationSet | None = None,
        parallel: DataParallel | None = None,
        callbacks: Sequence[Callback] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.config, self.reader, self.validation = model, config, reader, validation
        self.parallel = parallel or DataParallel(device=next(model.parameters()).device)
        self.callbacks = list(callbacks) if self.parallel.is_first else []
        self.say = say if self.parallel.is_first else lambda text: None
        self.buffers = ParamBuffers(model)
        self.parallel.broadcast_parameters(self.buffers)
        graphs = config.cuda_graphs
        if graphs is None:  # ranks that share a GPU would each keep its activations there
            reason = why_no_graphs(self.parallel.device, model.embed.weight.dtype, config.ep)
            graphs = reason is None and not ranks_share_gpus()
        self.gradients = Gradients(model, balance_alpha=config.balance_alpha, cuda_graphs=graphs)
        self.optimizer = AdamW(
            self.buffers,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            clip=config.clip,
        )
        self.bias = ExpertBias(model)
        self.ema = Ema(self.buffers, config.ema_decay) if config.ema_decay else None
        self.batch_size = config.batch_size(ranks=self.parallel.world)
        self.out = Path(config.out)
        self.step = self.tokens = 0
        self.last_checkpoint: Path | None = None
        self.interrupted = False
        self._stop: _StopSignal | None = None
        self._clock = _Clock()
        self._agreed_seconds, self._agreed_stop = 0.0, False
        self._pending: _Issued | None = None
        self._stamp: _Stamp | None = None

    # ---- the loop ----
    def train(self) -> EvalReport | None:
        """Runs to the end of the run and returns the last validation, if there is validation text.

        SIGINT or SIGTERM ends the run after the current step, or in the middle of a validation, with a checkpoint, and sets
        `interrupted`. The last checkpoint is written before the last validation. Raises Diverged
        after config.max_skips steps in a row that were not finite, RankLost where another rank's process is gone,
        CheckpointError if a checkpoint cannot be written.
        """
        config, result = self.config, None
        with _StopSignal(self.say) as stop, naming_lost_ranks():  # torchrun sends SIGTERM meanwhile
            self._stop = stop
            self._clock.start()
            self._call("on_start", self)
            try:
                while self.progress < 1 and not self._should_stop(stop.requested):
                    self._issue_step(stop.requested)
                    if config.eval_every and self.step % config.eval_every == 0 and self.progress < 1:
                        self._drain()
                        self.evaluate(config.eval_sequences)
                    if self.step % config.save_every == 0:
                        self.save()
                self._drain()
                self.interrupted = self._should_stop(stop.requested) and self.progress < 1
                self.save()
                if not self.interrupted:
                    result = self.evaluate()
                    self.interrupted = result is None and self.validation is not None
            finally:
                self._stop = None
                self._call("on_end", self)
        return result

    @property
    def progress(self) -> float:
        """Fraction of the run that is done; ranks agree on it."""
        return self.config.progress(step=self.step, tokens=self.tokens, seconds=self._seconds())

    def _seconds(self) -> float:
        return self._clock.seconds() if self.parallel.world == 1 else self._agreed_seconds

    def _should_stop(self, requested: bool) -> bool:
        return requested if self.parallel.world == 1 else self._agreed_stop

    def _is_to_stop(self) -> bool:
        """Whether any rank was told to; all ask together, and wait for each other."""
        requested = self._stop is not None and self._stop.requested
        if self.parallel.world > 1:
            told = self.parallel.sum(torch.tensor(float(requested), device=self.parallel.device))
            requested = self._agreed_stop = bool(told > 0)
        return requested

    def _issue_step(self, stop_requested: bool) -> None:
        """Forward and backward of all micro-batches, reduction and update; then the report of the step before."""
        config, progress = self.config, self.progress
        lr = config.learning_rate.at(progress=progress, step=self.step, tokens=self.tokens)
        mtp_weight, gamma = config.mtp_schedule.at(progress), config.gamma_schedule.at(progress)
        size = self.batch_size.at(self.tokens)
        if self._stamp is None:
            self._stamp = _Stamp(self.parallel.device)
        losses, load = self._accumulate_gradients(size, mtp_weight)
        self.parallel.reduce_gradients(self.buffers)
        agreed = [float(stop_requested), self._clock.seconds() if self.parallel.is_first else 0.0]
        values = self.parallel.sum(torch.cat([losses, *(losses.new_full((1,), value) for value in agreed)]))
        load = self.parallel.sum(load)
        result = self.optimizer.step(lr, values[0], self.parallel.grad_norm(self.buffers))
        self.model.refresh_fp8()
        self.bias.update(load, gamma, result.skip)
        self.step += 1
        self.tokens += size * config.seq_len
        self._settle()
        if self.ema:
            self.ema.snapshot(result.skip)
        flags = [result.grad_norm, result.skip, self.optimizer.skipped, self.optimizer.skipped_in_row]
        values = torch.cat([values, torch.stack([flag.double() for flag in flags])])
        values, load = (t.to("cpu", non_blocking=True) for t in (values, load))
        schedule = {"lr": lr, "mtp_weight": mtp_weight, "gamma": gamma, "batch": size, "progress": progress}
        started, self._stamp = self._stamp, _Stamp(self.parallel.device)
        seconds = self._clock.seconds()
        self._pending = _Issued(self.step, self.tokens, seconds, schedule, values, load, started, self._stamp)

    def _accumulate_gradients(self, size: int, mtp_weight: float) -> tuple[Tensor, Tensor]:
        """Of this rank's part of a batch of `size` sequences; returns what Gradients.add does."""
        rows = self.reader.next(size)
        if self.parallel.device.type == "cuda":
            rows = rows.pin_memory().to(self.parallel.device, non_blocking=True)
        return self.gradients.add(rows, self.config.micro_batch, size=size, mtp_weight=mtp_weight)

    def _settle(self) -> None:
        """Reports the step issued before, once it has finished."""
        issued, self._pending = self._pending, None
        if issued is None:
            return
        issued.finished.wait()
        report = self._report(issued)
        self._agreed_stop, self._agreed_seconds = bool(issued.values[4] > 0), float(issued.values[5])
        if self.ema:
            self.ema.settle(report.skipped)
        self._call("on_step", report)
        if report.skipped_in_row >= self.config.max_skips:
            first, last = report.step - report.skipped_in_row + 1, report.step
            kept = self.last_checkpoint or "none, no step was saved yet"
            raise Diverged(f"loss or gradient not finite in steps {first} to {last}: stopped; last checkpoint: {kept}")

    def _report(self, issued: _Issued) -> StepReport:
        total, ce, mtp, balance, _, _, grad_norm, skipped, skipped_total, in_row = issued.values.tolist()
        schedule = issued.schedule
        step_tokens = schedule["batch"] * self.config.seq_len
        return StepReport(
            step=issued.step,
            loss=total,
            ce=ce,
            mtp=mtp,
            balance=balance,
            bits_per_byte=ce / math.log(2) / self.reader.dataset.bytes_per_token,
            tokens=issued.tokens,
            seconds=issued.seconds,
            tokens_per_s=step_tokens / issued.finished.seconds_since(issued.started),
            grad_norm=grad_norm,
            skipped=bool(skipped),
            skipped_total=int(skipped_total),
            skipped_in_row=int(in_row),
            expert_load=issued.load,
            **schedule,
        )

    def _drain(self) -> None:
        """Waits for the step in flight and reports it."""
        self._settle()
        self._stamp = None

    def _call(self, name: str, argument: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(argument)

    # ---- validation ----
    @torch.no_grad()
    def evaluate(self, max_sequences: int = 0) -> EvalReport | None:
        """Scores the validation text, or its first `max_sequences` windows, rounded up to whole micro-batches (0: all). Ranks
        share the work. None without such text, or where a rank was told to stop meanwhile."""
        if self.validation is None:
            return None
        self.gradients.release()
        sums = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)  # nats, targets
        for tokens, mask in self._share(self.validation.batches(self.config.micro_batch), max_sequences):
            if self._is_to_stop():
                return None
            batch = Batch(tokens.to(self.parallel.device), mask.to(self.parallel.device))
            loss = self.model.loss(batch, mtp_weight=0.0, balance_alpha=0.0)
            sums += torch.stack([loss.ce.double() * loss.num_tokens, torch.as_tensor(loss.num_tokens).double()])
        nats, targets = self.parallel.sum(sums).tolist()
        mean = nats / targets
        every = self.validation.num_targets
        report = EvalReport(
            self.step, mean, self.validation.bits_per_byte(mean * every), int(targets), full=int(targets) == every
        )
        self._call("on_eval", report)
        return report

    def _share(self, batches: Iterator[tuple[Tensor, Tensor]], max_sequences: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of (tokens, mask) batches, as many as every other's, since ranks may need each other's experts:
        where nothing is left for it, a batch of which nothing counts."""
        rank, world = self.parallel.rank, self.parallel.world
        if max_sequences:
            batches = islice(batches, -(-max_sequences // self.config.micro_batch))
        while turn := list(islice(batches, world)):
            tokens, mask = turn[min(rank, len(turn) - 1)]
            yield tokens, mask if rank < len(turn) else torch.zeros_like(mask)

    # ---- checkpoints ----
    def save(self) -> Path:
        """Writes the checkpoint of the current step, unless it is there already."""
        self._drain()
        final = self.out / f"step-{self.step:08d}"
        if self.last_checkpoint == final:
            return final
        info = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self._clock.seconds(),
            "data": self.reader.state_dict(),
            "train_config": self.config.to_dict(),
            "config": self.model.config.to_dict(),
        }
        state = self._state()
        path = checkpoint.save(self.out, self.step, state, info, parallel=self.parallel, keep=self.config.keep)
        self.last_checkpoint = path
        self._call("on_save", path)
        return path

    def resume(self) -> bool:
        """Continues from the newest intact checkpoint in config.out; False if there is none.

        The next step is bit for bit the one that would have followed (with max_seconds, but for its learning rate).
        Raises ValueError for a checkpoint of another model, or whose data position was counted in other data.
        """
        found = checkpoint.latest(self.out, parallel=self.parallel, report=self.say)
        if found is None:
            return False
        info = checkpoint.read_info(found)
        self._compare(info)
        self.reader.load_state_dict(info["data"])
        state = self._state()
        stored = checkpoint.stored_names(found)
        rng = f"rng_{self.parallel.rank}"
        for optional in ("ema", rng):  # absent after a change of settings, of the number of ranks, of the device
            state[optional] = {k: v for k, v in state.get(optional, {}).items() if f"{optional}.{k}" in stored}
        checkpoint.load(found, state, parallel=self.parallel)
        self._after_load()
        self._set_rng(state[rng])
        if self.ema and not state["ema"]:
            self.ema = Ema(self.buffers, self.config.ema_decay)
        self.step, self.tokens, self.last_checkpoint = info["step"], info["tokens"], found
        self._clock = _Clock(info["seconds"])
        self._agreed_seconds = info["seconds"]
        return True

    def _compare(self, info: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture and mentions changed settings."""
        for key, value in json.loads(json.dumps(self.model.config.to_dict())).items():
            if info["config"].get(key) != value:
                raise ValueError(
                    f"cannot resume another model: expected {key} {info['config'].get(key)}, found {value}"
                )
        was, now = info["train_config"], self.config.to_dict()
        changed = [f"{key} {was.get(key)} -> {value}" for key, value in now.items() if was.get(key) != value]
        if changed:
            self.say(f"settings changed since the checkpoint: {', '.join(changed)}")

    def start_from(self, path: Path, *, keep_optimizer: bool = True) -> None:
        """Takes weights, routing bias and, if wanted, optimizer state of a checkpoint; steps and data begin anew."""
        found = checkpoint.find(path)
        self.parallel.first(lambda: checkpoint.check(found))
        names = ["master", "expert_bias", *(["exp_avg", "exp_avg_sq", "optimizer"] if keep_optimizer else [])]
        state = self._state()
        checkpoint.load(found, {name: state[name] for name in names if name in state}, parallel=self.parallel)
        self.optimizer.skipped.zero_()
        self.optimizer.skipped_in_row.zero_()
        self._after_load()
        if self.ema:
            self.ema = Ema(self.buffers, self.config.ema_decay)

    def _after_load(self) -> None:
        self.buffers.sync_weights()
        self.model.refresh_fp8()
        self.buffers.zero_grad()

    def _state(self) -> checkpoint.State:
        """Everything that later steps depend on, as tensors; parameters by name, so that ranks may be laid out anew."""
        state: checkpoint.State = {name: {} for name in ("master", "exp_avg", "exp_avg_sq")}
        for slot, group in self.buffers.slots():
            for name in state:
                state[name][slot.name] = self.parallel.whole(slot.name, slot.view(getattr(group, name)))
        optimizer = self.optimizer
        state["optimizer"] = {n: getattr(optimizer, n) for n in ("step_count", "skipped", "skipped_in_row")}
        if self.bias.bias.numel():
            state["expert_bias"] = self.bias.bias
        if self.ema:
            state["ema"] = {name: self.parallel.whole(name, view) for name, view in self.ema.views().items()}
        rng = {"cpu": torch.get_rng_state()}
        if self.parallel.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.parallel.device)
        state[f"rng_{self.parallel.rank}"] = rng
        return state

    def _set_rng(self, rng: dict[str, Tensor]) -> None:
        if "cpu" in rng:
            torch.set_rng_state(rng["cpu"])
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.parallel.device)


@dataclass(frozen=True)
class _Issued:
    """A step whose results are on their way to the host."""

    step: int
    tokens: int
    seconds: float
    schedule: dict[str, Any]
    values: Tensor  # fp64 [10]: total, ce, mtp, balance, stop, seconds, grad norm, skip, skipped, skipped in a row
    load: Tensor  # int64 [layers, experts]
    started: _Stamp
    finished: _Stamp


class _Clock:
    """Seconds of training, those of earlier parts of a resumed run included. Stands still until started."""

    def __init__(self, earlier: float = 0.0) -> None:
        self._earlier, self._start = earlier, None

    def start(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        return self._earlier + (0.0 if self._start is None else time.monotonic() - self._start)


class _Stamp:
    """A moment in the device's work, taken without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: _Stamp) -> float:
        """Both must have been reached."""
        if self._event is not None:
            return earlier._event.elapsed_time(self._event) / 1e3
        return self._time - earlier._time


class _StopSignal:
    """Turns SIGINT and SIGTERM into a request to stop after the current step; a second one interrupts at once. A request counts
    also where it cannot be answered: the step may be writing where `say` does."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self._say, self._previous = say, {}

    def __enter__(self) -> _StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(RuntimeError):
            self._say("stopping after this step, then saving; once more to stop at once")
