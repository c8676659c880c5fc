"""A Modal on this machine: a gRPC server for the unmodified `modal` client, and its real container runtime as processes.

It speaks the client's protocol, which is private and drifts between versions; `TESTED` says which one this is. An image
is not built: a container is a process of this Python whose working folder holds the files that the client uploaded, and
whose Volumes are folders. What Modal does with a container that dies or runs too long, this does too.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modal
import psutil
from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from grpclib.const import Handler
from grpclib.server import Server
from modal_proto import api_grpc, api_pb2

TESTED = "1.6"
# What a function that asks for a GPU gets: the name, and nothing that computes.
GPU = "NVIDIA H100 80GB HBM3"
Result = api_pb2.GenericResult


@dataclass(slots=True)
class Call:
    """A call of a function: its input, what its generator has yielded, how it ended."""

    id: str
    function_id: str
    input: api_pb2.FunctionInput
    chunks: list[api_pb2.DataChunk] = field(default_factory=list)
    output: api_pb2.FunctionGetOutputsItem | None = None
    container: str = ""


class Loopback:
    """Everything the client asks for, under the name of its RPC: a request in, a reply out."""

    def __init__(self, root: Path, *, containers: int = 4, limit: float | None = None) -> None:
        """`containers` at once; a call may take `limit` seconds, in place of what its function says."""
        if modal.__version__.rpartition(".")[0] != TESTED:
            raise RuntimeError(
                f"The loopback speaks the protocol of modal {TESTED}, and {modal.__version__} is installed."
            )
        self.root, self.containers, self.limit = root, containers, limit
        self.requests: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.mounts: dict[str, list[api_pb2.MountFile]] = {}
        self.functions: dict[str, api_pb2.Function] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.calls: dict[str, Call] = {}
        self.blobs: dict[str, bytes] = {}
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.logs: list[str] = []
        self.retired: set[str] = set()
        self.disconnected = False
        self.counts: dict[str, int] = defaultdict(int)

    def new(self, kind: str) -> str:
        """The next object id of a kind."""
        self.counts[kind] += 1
        return f"{kind}-{self.counts[kind]}"

    def named(self, name: str) -> list[Any]:
        """All requests of one RPC, in order."""
        return [request for asked, request in self.requests if asked == name]

    def client_environment(self) -> dict[str, str]:
        """What a client must have in its environment to come here, and nowhere else."""
        (self.root / "no-config.toml").touch()
        return {
            "MODAL_SERVER_URL": f"http://127.0.0.1:{self.port}", "MODAL_CONFIG_PATH": str(self.root / "no-config.toml"),
            "MODAL_TOKEN_ID": "ak-loopback", "MODAL_TOKEN_SECRET": "as-loopback", "MODAL_LOGS_TIMEOUT": "2",
        }  # fmt: skip

    # The server itself: a thread with a loop of its own.

    def __enter__(self) -> "Loopback":
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(20)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _start(self) -> None:
        self.changed = asyncio.Condition()
        self.server = Server([_Service(self)])
        await self.server.start("127.0.0.1", 0)
        self.port = self.server._server.sockets[0].getsockname()[1]
        store = web.Application(client_max_size=1 << 30)
        store.router.add_put("/{id}", self._store)
        store.router.add_get("/{id}", self._fetch)
        self.store = web.AppRunner(store)
        await self.store.setup()
        site = web.TCPSite(self.store, "127.0.0.1", 0)
        await site.start()
        self.store_port = site._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        await self.AppClientDisconnect(None)
        self.server.close()
        await self.store.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _store(self, request: web.Request) -> web.Response:
        content = await request.read()
        self.blobs[request.match_info["id"]] = content
        return web.Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    async def _fetch(self, request: web.Request) -> web.Response:
        return web.Response(body=self.blobs[request.match_info["id"]])

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _until(self, condition: Callable[[], Any], seconds: float) -> Any:
        """What `condition` gives once it gives something, None after `seconds`."""
        async with self.changed:
            try:
                return await asyncio.wait_for(self.changed.wait_for(condition), seconds)
            except TimeoutError:
                return None

    # Objects: environments, apps, secrets, volumes, mounts, images.

    async def ClientHello(self, _: Any) -> Any:
        return api_pb2.ClientHelloResponse()

    async def EnvironmentGetOrCreate(self, _: Any) -> Any:
        settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        metadata = api_pb2.EnvironmentMetadata(name="main", settings=settings)
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    async def AppCreate(self, _: Any) -> Any:
        self.disconnected = False
        return api_pb2.AppCreateResponse(app_id="ap-1", app_page_url="http://127.0.0.1/app")

    async def AppHeartbeat(self, _: Any) -> Any:
        return Empty()

    async def AppPublish(self, _: Any) -> Any:
        return api_pb2.AppPublishResponse(url="http://127.0.0.1/app")

    async def AppClientDisconnect(self, _: Any) -> Any:
        self.disconnected = True
        # What has not begun never will.
        for call in self.calls.values():
            call.container = call.container or "nowhere"
        living = [process for process in self.processes.values() if process is not None and process.returncode is None]
        for process in living:
            self._kill(process)
        await asyncio.gather(*(process.wait() for process in living))
        await self._notify()
        return Empty()

    async def AppGetLogs(self, _: Any) -> Any:
        sent = 0
        while not self.disconnected:
            await self._until(lambda sent=sent: self.disconnected or len(self.logs) > sent, 5)
            items = [api_pb2.TaskLogs(data=text, file_descriptor=1) for text in self.logs[sent:]]
            sent = len(self.logs)
            if items:
                yield api_pb2.TaskLogsBatch(task_id="ta-0", items=items, entry_id=str(sent))
        yield api_pb2.TaskLogsBatch(app_done=True)

    async def SecretGetOrCreate(self, request: Any) -> Any:
        name = self.new("st")
        self.secrets[name] = dict(request.env_dict)
        return api_pb2.SecretGetOrCreateResponse(secret_id=name)

    async def VolumeGetOrCreate(self, request: Any) -> Any:
        return api_pb2.VolumeGetOrCreateResponse(volume_id=f"vo-{request.deployment_name}", version=request.version)

    async def VolumeCommit(self, _: Any) -> Any:
        return api_pb2.VolumeCommitResponse()

    async def VolumeReload(self, _: Any) -> Any:
        return Empty()

    async def MountGetOrCreate(self, request: Any) -> Any:
        name = self.new("mo")
        self.mounts[name] = list(request.files)
        return api_pb2.MountGetOrCreateResponse(mount_id=name, handle_metadata=api_pb2.MountHandleMetadata())

    async def MountBatchedCheckExistence(self, request: Any) -> Any:
        missing = [sha for sha in request.sha256_hex_hashes if sha not in self.files]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request: Any) -> Any:
        if request.WhichOneof("data_oneof"):
            content = self.blobs[request.data_blob_id] if request.data_blob_id else request.data
            self.files[hashlib.sha256(content).hexdigest()] = content
        return api_pb2.MountPutFileResponse(exists=request.sha256_hex in self.files)

    async def ImageGetOrCreate(self, request: Any) -> Any:
        result = Result(status=Result.GENERIC_STATUS_SUCCESS)
        metadata = api_pb2.ImageMetadata(image_builder_version="2025.06", workdir="/root")
        return api_pb2.ImageGetOrCreateResponse(image_id=self.new("im"), result=result, metadata=metadata)

    async def BlobCreate(self, _: Any) -> Any:
        name = self.new("bl")
        urls = api_pb2.UploadUrlList(items=[f"http://127.0.0.1:{self.store_port}/{name}"])
        return api_pb2.BlobCreateResponse(blob_ids=[name], upload_urls=urls)

    async def BlobGet(self, request: Any) -> Any:
        return api_pb2.BlobGetResponse(download_url=f"http://127.0.0.1:{self.store_port}/{request.blob_id}")

    # Functions and their calls.

    async def FunctionPrecreate(self, request: Any) -> Any:
        metadata = api_pb2.FunctionHandleMetadata(
            function_name=request.function_name, function_type=request.function_type
        )
        return api_pb2.FunctionPrecreateResponse(function_id=self.new("fu"), handle_metadata=metadata)

    async def FunctionCreate(self, request: Any) -> Any:
        data = request.function_data
        if not data.ranked_functions:
            data.ranked_functions.add(rank=0, function=request.function)
        function = data.ranked_functions[0].function
        self.functions[request.existing_function_id] = function
        return api_pb2.FunctionCreateResponse(
            function_id=request.existing_function_id, function=request.function, function_data=data,
            handle_metadata=self._metadata(function),
        )  # fmt: skip

    @staticmethod
    def _metadata(function: api_pb2.Function) -> api_pb2.FunctionHandleMetadata:
        return api_pb2.FunctionHandleMetadata(
            function_name=function.function_name, function_type=function.function_type,
            supported_input_formats=function.supported_input_formats,
            supported_output_formats=function.supported_output_formats,
        )  # fmt: skip

    async def FunctionMap(self, request: Any) -> Any:
        call = Call(self.new("fc"), request.function_id, request.pipelined_inputs[0].input)
        self.calls[call.id] = call
        self._place()
        await self._notify()
        put = api_pb2.FunctionPutInputsResponseItem(idx=0, input_id=f"in-{call.id}", input_jwt="jwt")
        return api_pb2.FunctionMapResponse(function_call_id=call.id, pipelined_inputs=[put], function_call_jwt="jwt")

    async def FunctionGetOutputs(self, request: Any) -> Any:
        call = self.calls[request.function_call_id]
        output = await self._until(lambda: call.output, request.timeout)
        return api_pb2.FunctionGetOutputsResponse(
            outputs=[output] if output else [], num_unfinished_inputs=int(not output)
        )

    async def FunctionCallGetDataOut(self, request: Any) -> Any:
        call, sent = self.calls[request.function_call_id], request.last_index
        while True:
            await self._until(lambda sent=sent: len(call.chunks) > sent or call.output, 5)
            for chunk in call.chunks[sent:]:
                yield chunk
            sent = len(call.chunks)

    # What containers ask for.

    async def ContainerHello(self, _: Any) -> Any:
        return Empty()

    async def ContainerHeartbeat(self, _: Any) -> Any:
        return api_pb2.ContainerHeartbeatResponse()

    async def ContainerStop(self, request: Any) -> Any:
        self.retired.add(request.task_id)
        return api_pb2.ContainerStopResponse()

    async def FunctionGetInputs(self, request: Any) -> Any:
        function_id, container = request.function_id.split("@")
        retired = container in self.retired
        call = None if retired else await self._until(lambda: self._waiting(function_id), 1.0)
        if call is None:
            # Nothing to do: the container may go.
            return api_pb2.FunctionGetInputsResponse(inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)])
        call.container = container
        if self.limit is not None:
            self.loop.create_task(self._time_out(call, self.limit))
        item = api_pb2.FunctionGetInputsItem(input_id=f"in-{call.id}", input=call.input, function_call_id=call.id)
        return api_pb2.FunctionGetInputsResponse(inputs=[item])

    async def FunctionCallPutDataOut(self, request: Any) -> Any:
        self.calls[request.function_call_id].chunks.extend(request.data_chunks)
        await self._notify()
        return Empty()

    async def FunctionPutOutputs(self, request: Any) -> Any:
        for item in request.outputs:
            await self._output(self.calls[item.input_id.removeprefix("in-")], item.result, item.data_format)
        return Empty()

    async def TaskResult(self, request: Any) -> Any:
        self.logs.append(request.result.traceback)
        return Empty()

    async def _output(self, call: Call, result: Any, data_format: int = 0) -> None:
        if call.output is None:
            call.output = api_pb2.FunctionGetOutputsItem(
                result=result, data_format=data_format, input_id=f"in-{call.id}"
            )
        await self._notify()

    async def _time_out(self, call: Call, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if call.output is None:
            await self._output(call, Result(status=Result.GENERIC_STATUS_TIMEOUT, exception=f"timeout of {seconds:g}s"))
            self._kill(self.processes[call.container])

    @staticmethod
    def _kill(process: asyncio.subprocess.Process) -> None:
        """As a machine that is taken away: what the container started, in groups of its own too, ends with it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            container = psutil.Process(process.pid)
            for each in (*container.children(recursive=True), container):
                each.kill()

    def _waiting(self, function_id: str) -> Call | None:
        calls = (call for call in self.calls.values() if call.function_id == function_id)
        return next((call for call in calls if not call.container and call.output is None), None)

    def _place(self) -> None:
        """Start containers for calls that wait, as far as there is room."""
        waiting = [call for call in self.calls.values() if not call.container and call.output is None]
        running = sum(process is None or process.returncode is None for process in self.processes.values())
        for call in waiting[: self.containers - running]:
            container = self.new("ta")
            self.processes[container] = None
            self.loop.create_task(self._container(call.function_id, container))

    async def _container(self, function_id: str, container: str) -> None:
        """Lay out what was uploaded, run the real entrypoint in it, and answer for it if it dies."""
        function, folder = self.functions[function_id], self.root / container
        for mount_id in function.mount_ids:
            for file in self.mounts[mount_id]:
                target = folder / file.filename.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._stored(file.sha256_hex), target)
        objects = [api_pb2.Object(object_id=function_id, function_handle_metadata=self._metadata(function))]
        objects += [api_pb2.Object(object_id=dependency.object_id) for dependency in function.object_dependencies]
        layout = api_pb2.AppLayout(objects=objects, function_ids={function.function_name: function_id})
        arguments = api_pb2.ContainerArguments(
            task_id=container, function_id=f"{function_id}@{container}", app_id="ap-1", function_def=function,
            app_layout=layout, environment_name="main",
        )  # fmt: skip
        (folder / "arguments").write_bytes(arguments.SerializeToString())
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "modal._container_entrypoint", cwd=folder / "root", start_new_session=True,
            env=self._environment(function, folder, container), stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        self.processes[container] = process
        async for line in process.stdout:
            self.logs.append(line.decode("utf-8", "replace"))
            await self._notify()
        await process.wait()
        for call in self.calls.values():
            if call.container == container and call.output is None:
                died = f"Container died with code {process.returncode}"
                await self._output(call, Result(status=Result.GENERIC_STATUS_INTERNAL_FAILURE, exception=died))
        if not self.disconnected:
            self._place()

    def _stored(self, sha256: str) -> Path:
        """An uploaded file on disk."""
        path = self.root / "files" / sha256
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(self.files[sha256])
        return path

    def _environment(self, function: api_pb2.Function, folder: Path, container: str) -> dict[str, str]:
        """The image's variables with Volumes as folders, the function's secrets, and what the runtime needs."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        given = {}
        for request in self.named("ImageGetOrCreate"):
            for line in request.image.dockerfile_commands:
                if found := re.fullmatch(r"ENV (\w+)=(.*)", line):
                    given[found[1]] = found[2].strip("'\"")
        for mount in function.volume_mounts:
            here = self.root / mount.volume_id
            here.mkdir(exist_ok=True)
            given = {name: re.sub(rf"^{mount.mount_path}(?=/|$)", str(here), text) for name, text in given.items()}
        given["PYTHONPATH"] = str(folder / "root")
        if function.resources.gpu_config.gpu_type:
            kept["PATH"] = f"{self._driver()}{os.pathsep}{kept['PATH']}"
        for secret in function.secret_ids:
            given |= self.secrets[secret]
        return {
            **kept, **given, "MODAL_IS_REMOTE": "1", "MODAL_TASK_ID": container, "OMP_NUM_THREADS": "1",
            "MODAL_SERVER_URL": f"http://127.0.0.1:{self.port}", "MODAL_CONFIG_PATH": str(self.root / "no-config.toml"),
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(folder / "arguments"), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def _driver(self) -> Path:
        """A folder with an `nvidia-smi` that sees `GPU`."""
        tool = self.root / "driver" / "nvidia-smi"
        if not tool.exists():
            tool.parent.mkdir()
            tool.write_text(f"#!/bin/sh\necho '{GPU}, 9.0, 81559, 570.86'\n")
            tool.chmod(0o755)
        return tool.parent


class _Service:
    """The server's side of the protocol: every RPC of the client's, answered by the method of its name."""

    def __init__(self, loopback: Loopback) -> None:
        self.loopback = loopback

    def __mapping__(self) -> dict[str, Handler]:
        names = {name: self._handler(name) for name in api_grpc.ModalClientBase.__abstractmethods__}
        complete = type("Complete", (api_grpc.ModalClientBase,), {name: staticmethod(f) for name, f in names.items()})
        return complete().__mapping__()

    def _handler(self, name: str) -> Callable[[Any], Any]:
        async def handle(stream: Any) -> None:
            request = await stream.recv_message()
            self.loopback.requests.append((name, request))
            method = getattr(self.loopback, name, None)
            if method is None:
                raise GRPCError(Status.UNIMPLEMENTED, f"The loopback has no {name}.")
            try:
                answer = method(request)
                if hasattr(answer, "__aiter__"):
                    async for message in answer:
                        await stream.send_message(message)
                else:
                    await stream.send_message(await answer)
            except (KeyError, LookupError, OSError, ValueError, TypeError, AttributeError) as error:
                # An exception as it is would have the client ask again for ever.
                raise GRPCError(Status.FAILED_PRECONDITION, f"{name}: {type(error).__name__}: {error}") from error

        return handle


if __name__ == "__main__":
    # By hand: prints the environment with which `modal run` comes here, and serves until it is interrupted.
    with Loopback(Path(sys.argv[1])) as served:
        print(json.dumps(served.client_environment(), indent=1), flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
