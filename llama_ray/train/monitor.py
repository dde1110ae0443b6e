"""The driver's side of a run: turns rank 0's events into lines, `metrics.jsonl` and a plot."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import defaultdict
from typing import Any

from llama_ray.config.pretrain import PretrainConfig
from llama_ray.data.shards import TokenManifest
from llama_ray.data.stream import TokenStream
from llama_ray.format import bar, count, duration, print_table, si
from llama_ray.storage import Storage
from llama_ray.train.mixture import drawn, print_drawn
from llama_ray.train.plot import loss_curve
from llama_ray.train.verdict import verdict

HEADER = (
    f"{'step':>8}  {'loss':>7}  {'valid':>7}  {'lr':>8}  {'‖g‖':>6}  {'tokens/s':>8}  "
    f"{'MFU':>6}  {'data wait':>9}  {'':16}  {'left':>8}"
)

MEASURED = {"step", "validation", "checkpoint", "mixture"}
# For how long a job that ends waits for its last figures to be written.
WRITE_SECONDS = 30.0


class Monitor:
    """Handles one event at a time; `records` are the lines of `metrics.jsonl`."""

    def __init__(
        self,
        config: PretrainConfig,
        storage: Storage,
        manifest: TokenManifest,
        stream: TokenStream,
    ) -> None:
        self.config, self.storage, self.manifest = config, storage, manifest
        self.stream = stream
        self.folder = f"runs/{config.name}"
        self.records = self._stored()
        self.step = 0  # that was last heard of
        self.ended = False
        self.writing = threading.Thread()
        self.row = ""
        self.began = time.monotonic()
        self.places: list[str] = []
        self.reports: list[dict[str, Any]] = []  # of ranks that stand still
        self.verdict_at = math.inf
        self.restarting_since = math.inf
        """When workers were lost whose successors have not reported yet, in `time.monotonic()`."""

    def handle(self, event: dict[str, Any]) -> None:
        """A method for each kind of event."""
        self.step = event.setdefault("step", self.step)
        event.setdefault("time", time.time())
        event["tokens"] = event["step"] * self.config.tokens_per_step
        getattr(self, f"_{event['event']}")(event)

    def tick(self) -> None:
        """To be called now and then."""
        if time.monotonic() >= self.verdict_at:
            self.verdict_at = math.inf
            self._flush_row()
            found = verdict(self.reports, self.places)
            hang = {"event": "hang", "step": self.step, "verdict": found, "time": time.time()}
            self.records.append(hang)
            print(found)

    def _stall(self, event: dict[str, Any]) -> None:
        self.reports.append(event)
        # The others' reports follow, within a tenth of the timeout.
        wait = 0.1 * self.config.failures.hang_seconds + 0.5
        self.verdict_at = min(self.verdict_at, time.monotonic() + wait)

    def _failure(self, event: dict[str, Any]) -> None:
        self.reports.append(event)

    def finish(self) -> None:
        """Write what has been gathered, also when the run has failed."""
        self._flush_row()
        self._wait_for_writing()
        if self.records:
            self._write()
            self._wait_for_writing()
        if self.writing.is_alive():
            print(f"warning: {self.storage.url(self.folder)}/metrics.jsonl is not up to date")

    def _start(self, event: dict[str, Any]) -> None:
        self._flush_row()
        self.rate, self.restarting_since = 0.0, math.inf
        self.places, self.reports, self.verdict_at = event["places"], [], math.inf
        # What was measured beyond the checkpoint is measured again.
        self.records = [
            r for r in self.records if r["step"] <= event["step"] or r["event"] not in MEASURED
        ] + [event]
        ranks = f"{len(self.places)} ranks"
        start = "starting"
        if event["step"]:
            start = f"resuming from the checkpoint of step {event['step']:,}"
        print(
            f"{start} on {ranks} after {duration(time.monotonic() - self.began)}; MFU is of "
            f"{si(event['peak_flops'])}FLOP/s ({event['peak_source']})\n\n{HEADER}"
        )

    def _failed(self, event: dict[str, Any]) -> None:
        self._flush_row()
        self.began = self.restarting_since = time.monotonic()
        self.records.append(event)
        for rank, reason in event["ranks"].items():
            print(f"rank {rank} failed: {reason}")

    def _left(self, event: dict[str, Any]) -> None:
        self._flush_row()
        self.began = self.restarting_since = time.monotonic()
        self.records.append(event)
        print(f"saved at step {event['step']:,}; the workers are started anew")

    def _stopped(self, event: dict[str, Any]) -> None:
        self._flush_row()
        self.records.append(event)
        print(f"stopped: saved at step {event['step']:,}; submit the job again to go on")

    def _step(self, event: dict[str, Any]) -> None:
        self._flush_row()
        self.records.append(event)
        done = event["step"] / self.config.train.steps
        # Smoothed, so that "left" does not jump about.
        rate = event["steps"] / event["seconds"]
        self.rate = 0.7 * self.rate + 0.3 * rate if self.rate else rate
        left = (self.config.train.steps - event["step"]) / self.rate
        self.row = (
            f"{event['step']:>8,}  {event['loss']:>7.3f}  {{valid:>7}}  {event['lr']:>8.2e}  "
            f"{event['grad_norm']:>6.2f}  {event['tokens_per_second']:>8,.0f}  "
            f"{event['mfu']:>6.1%}  {event['data_wait']:>9.1%}  {bar(done)}  {duration(left):>8}"
        )
        for skipped in event.get("skipped", []):
            print(
                f"step {skipped['step']:,} skipped: gradient norm {skipped['grad_norm']:.3g}, loss "
                f"{skipped['loss']:.3f}, samples {skipped['samples'][0]:,} to "
                f"{skipped['samples'][1]:,}"
            )
        self._print_replaced(event.get("replaced", []))
        if (
            event["step"] % self.config.train.validate_every
            and event["step"] < self.config.train.steps
        ):
            self._flush_row()

    def _print_replaced(self, samples: list[dict[str, Any]]) -> None:
        """A line for each kind of damage; all samples are in the metrics."""
        by_damage: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for sample in samples:
            by_damage[sample["shard"], sample["what"]].append(sample)
        for (shard, what), those in by_damage.items():
            first = f"batch {those[0]['step']:,}, index {those[0]['index']:,}"
            others = f" and {len(those) - 1:,} more" if len(those) > 1 else ""
            print(f"replaced: {first}{others}: {self.storage.url(shard)} {what}")

    def _validation(self, event: dict[str, Any]) -> None:
        self.records.append(event)
        # A row of its own where no step was reported just before.
        self.row = self.row or f"{event['step']:>8,}  {'':>7}  {{valid:>7}}"
        self._flush_row(f"{event['validation_loss']:.3f}")

    def _checkpoint(self, event: dict[str, Any]) -> None:
        self._flush_row()
        self.records.append(event)
        self._write()

    def _end(self, event: dict[str, Any]) -> None:
        self._flush_row()
        n_replaced = sum(len(record.get("replaced", ())) for record in self.records)
        sources = drawn(self.stream, event["step"])
        mixture = {"event": "mixture", "sources": sources, "replaced": n_replaced}
        self.records.append(event | mixture)
        self.ended = True
        last = {r["event"]: r for r in self.records}
        entropy = self.manifest.unigram_entropy_nats
        loss = last["validation"]["validation_loss"]
        print_table(
            f"trained {self.config.name} on {count(event['tokens'])} tokens in "
            f"{duration(time.monotonic() - self.began)}",
            [
                ("validation loss", f"{loss:.3f} nats per token"),
                ("unigram entropy", f"{entropy:.3f} nats per token ({entropy - loss:+.3f} better)"),
                ("checkpoint", f"{self.storage.url(self.folder)}/checkpoints, committed"),
                ("loss curve", f"{self.storage.url(self.folder)}/loss.png"),
            ],
        )
        print_drawn(self.stream, event["step"], sources)
        if n_skipped := sum(len(record.get("skipped", ())) for record in self.records):
            print(f"{n_skipped:,} steps were skipped: see `skipped` in metrics.jsonl\n")
        if n_replaced:
            print(
                f"{n_replaced:,} of these were trained on in the place of others, whose shards are "
                f"damaged: see `replaced` in {self.storage.url(self.folder)}/metrics.jsonl\n"
            )

    def _flush_row(self, valid: str = "") -> None:
        if self.row:
            print(self.row.format(valid=valid))
            self.row = ""

    def _stored(self) -> list[dict[str, Any]]:
        """What earlier jobs of this run have measured."""
        try:
            lines = self.storage.read(f"{self.folder}/metrics.jsonl").decode().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def _wait_for_writing(self) -> None:
        if self.writing.is_alive():
            self.writing.join(WRITE_SECONDS)

    def _write(self) -> None:
        """In a thread, for storage may be away. While it is at it, nothing else is written."""
        if self.writing.is_alive():
            return
        lines = "".join(json.dumps(_finite(record)) + "\n" for record in self.records)
        title = f"{self.config.name}: LLaMA {count(self.config.model.n_params)}"
        plot = loss_curve(self.records, title, self.manifest.unigram_entropy_nats)

        def write() -> None:
            try:
                self.storage.write(f"{self.folder}/metrics.jsonl", lines.encode())
                self.storage.write(f"{self.folder}/loss.png", plot)
            except Exception as error:
                print(f"warning: the run's metrics could not be written: {error}")

        self.writing = threading.Thread(target=write, daemon=True)
        self.writing.start()


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity: their names instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value
