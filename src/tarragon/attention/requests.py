"""The attention worker's side of its link to the gateway: requests in, tokens out."""

from __future__ import annotations

import os
import queue
import sys
from contextlib import suppress
from typing import Any

from tarragon.attention.control import ControlThread
from tarragon.attention.gateway_link import Ended, GatewayLink, Mail
from tarragon.attention.resume import Foreseen, Resumer
from tarragon.gateway.wire import (
    FROM_GATEWAY,
    Abort,
    Add,
    Attach,
    Codec,
    Facts,
    Hold,
    Message,
    Outputs,
    Resumed,
    Utility,
    UtilityResult,
)
from tarragon.messages import ProtocolError


class Requests:
    """Owns the gateway link of an engine; called by the engine thread alone.

    One gateway is attached at a time. When it goes away, or a newer one attaches,
    its requests are aborted: nobody would read their tokens.
    """

    def __init__(
        self,
        engine: Any,
        control: ControlThread,
        vllm_config: Any,
        resumer: Resumer,
        attempts: dict[str, int],
    ) -> None:
        self._engine = engine
        self._control = control
        self._resumer = resumer
        self._vllm_config = vllm_config
        self._codec = Codec(FROM_GATEWAY)
        self._link: GatewayLink | None = None
        self._gateway_epoch = -1
        self._attempts = attempts
        self.deferred: list[tuple[Add, Foreseen | None]] = []
        """Requests to be taken up after the next step, which forgets an older attempt of theirs."""

    # ------------------------------------------------------------------ in

    def take_up(self) -> None:
        """Handle everything that has arrived, without waiting."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._control.wake_fd)
        self._attach_newcomers()
        deferred, self.deferred = self.deferred, []
        for message, foreseen in deferred:
            self._begin(message, foreseen)
        while self._link is not None:
            try:
                mail = self._link.mail.get_nowait()
            except queue.Empty:
                return
            try:
                self._open(mail)
            except ProtocolError as error:
                self._end(Ended(str(error), malformed=True))

    def _open(self, mail: Mail | Ended) -> None:
        if isinstance(mail, Ended):
            self._end(mail)
        else:
            self._handle(mail)

    def _end(self, ended: Ended) -> None:
        self._control.refe.counters.frames_malformed += ended.malformed
        self._detach(ended.cause)

    def _attach_newcomers(self) -> None:
        while not self._control.gateways.empty():
            connection, frame = self._control.gateways.get_nowait()
            try:
                message = self._codec.decode(frame)
                if not isinstance(message, Attach) or message.worker_epoch != self._control.boot.epoch:
                    raise ProtocolError("the first message must attach to this incarnation")
                if message.gateway_epoch < self._gateway_epoch:
                    raise ProtocolError(f"gateway epoch {message.gateway_epoch} is stale")
                connection.send(self._codec.encode(self._facts()))
            except (ConnectionError, ProtocolError) as error:
                self._control.refe.counters.frames_malformed += isinstance(error, ProtocolError)
                print(f"refused a gateway link: {error}", file=sys.stderr)
                connection.close()
                continue
            if self._link is not None:
                self._detach("a newer gateway attached")
            self._gateway_epoch = message.gateway_epoch
            self._link = GatewayLink(connection, self._control.wake_fd, self._resumer.foresee)

    def _detach(self, cause: str) -> None:
        link = self._link
        if link is None:
            return
        print(f"gateway link ended: {cause}", file=sys.stderr)
        link.close()
        self._link = None
        self._forget(list(self._attempts))

    def _handle(self, mail: Mail) -> None:
        message = mail.message
        match message:
            case Add():
                self._add(message, mail.foreseen)
            case Hold():
                self._hold(message.attempts)
            case Abort():
                known = [
                    name for name, attempt in message.attempts.items() if self._attempts.get(name) == attempt
                ]
                self._forget(known)
            case Utility():
                self._send(self._call(message))
            case _:
                raise ProtocolError(f"{type(message).__name__} after the first message")

    def _add(self, message: Add, foreseen: Foreseen | None) -> None:
        name = message.request.request_id
        if name in self._attempts:
            self._forget([name])  # an older attempt, whose abort is on its way
        self._attempts[name] = message.attempt
        self._begin(message, foreseen)

    def _begin(self, message: Add, foreseen: Foreseen | None) -> None:
        if message.request.request_id in self._engine.scheduler.finished_req_ids:
            # An older attempt has ended, and the next step will clear away what goes by this name.
            self.deferred.append((message, foreseen))
            return
        if message.sent or message.origins:
            self._resumer.add(message, foreseen)
            return
        request, wave = self._engine.preprocess_add_request(message.request)
        self._engine.add_request(request, wave)

    def _hold(self, attempts: dict[str, int]) -> None:
        """Compute these no further: what was committed of them is being taken over by another worker."""
        scheduler = self._engine.scheduler
        for name, attempt in attempts.items():
            if self._attempts.get(name) != attempt:
                continue
            request = scheduler.requests.get(name)
            if request is not None and request in scheduler.running:
                scheduler.running.remove(request)  # an abort finds it among all requests
            else:
                self._forget([name])  # it has no rows here

    def _forget(self, names: list[str]) -> None:
        for name in names:
            del self._attempts[name]
        gone = set(names)
        self.deferred = [entry for entry in self.deferred if entry[0].request.request_id not in gone]
        self._resumer.abort(names)
        self._engine.abort_requests(names)

    def _call(self, utility: Utility) -> UtilityResult:
        try:
            return UtilityResult(
                call_id=utility.call_id, result=getattr(self._engine, utility.name)(*utility.args)
            )
        except Exception as error:  # the gateway turns it into an error of its caller
            return UtilityResult(call_id=utility.call_id, failure=f"{type(error).__name__}: {error}")

    # ------------------------------------------------------------------ out

    def deliver(self, outputs: dict[int, Any]) -> None:
        """Send what one step produced; drop what belongs to nobody any more."""
        for step in outputs.values():
            step.outputs = [output for output in step.outputs if output.request_id in self._attempts]
            attempts = {output.request_id: self._attempts[output.request_id] for output in step.outputs}
            for output in step.outputs:
                if output.finished:
                    del self._attempts[output.request_id]
            step.finished_requests = None
            if step.outputs or step.scheduler_stats is not None:
                self._send(Outputs(attempts=attempts, outputs=step, resumed=self._resumed_in(step)))

    def _resumed_in(self, step: Any) -> dict[str, Resumed]:
        """Requests from elsewhere that deliver with this step; told once."""
        resumed = self._resumer.resumed
        if not resumed:
            return {}
        names = [output.request_id for output in step.outputs if output.request_id in resumed]
        return {name: resumed.pop(name) for name in names}

    def _send(self, message: Message) -> None:
        if self._link is None:
            return
        try:
            self._link.send(self._codec.encode(message))
        except ConnectionError:
            return  # the link's reader sees the end of file

    def _facts(self) -> Facts:
        cache, scheduler = self._vllm_config.cache_config, self._vllm_config.scheduler_config
        boot = self._control.boot
        return Facts(
            worker_id=boot.worker_id,
            epoch=boot.epoch,
            max_model_len=self._vllm_config.model_config.max_model_len,
            num_gpu_blocks=cache.num_gpu_blocks or 0,
            block_size=cache.block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            kv_cache_size_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
        )
