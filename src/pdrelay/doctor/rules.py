"""Every known cause of a failed start or hand-over, most specific first.

The wordings are those of vLLM 0.8 to 0.33, SGLang 0.4 to 0.5, torch, NCCL, ZeroMQ, NIXL and
UCX; `tests/doctor/logs` holds a log for each, captured where that was possible.
"""

from __future__ import annotations

from pdrelay.doctor.rule import Rule

_P2P = r"p2p_nccl|P2pNccl"
_IN_USE = r"(?i)address already in use"

CONNECTOR_RULES = (
    Rule(
        "v0_connector",
        r"Unsupported connector type: (?P<name>PyNcclConnector|LMCacheConnector|"
        r"MooncakeStoreConnector|SimpleConnector)\b",
        "{name} is a connector of vLLM's V0 engine; the V1 engine does not have it",
        "use NixlConnector, or pdrelay's own (--connector pdrelay); LMCache is LMCacheConnectorV1",
        engines=("vllm",),
    ),
    Rule(
        "v0_connector",
        r"Attempting to initialize a V\d Connector, but found",
        "the connector belongs to the other of vLLM's engines (V0 against V1)",
        "use a V1 connector, such as NixlConnector, and leave VLLM_USE_V1 unset",
        engines=("vllm",),
    ),
    Rule(
        "connector_removed",
        r"Unsupported connector type: P2pNcclConnector\b",
        "P2pNcclConnector was removed in vLLM 0.24",
        "use pdrelay's connector (--connector pdrelay) or NixlConnector, or install vLLM 0.23",
        engines=("vllm",),
        since=(0, 24, 0),
    ),
    Rule(
        "connector_too_new",
        r"Unsupported connector type: P2pNcclConnector\b",
        "P2pNcclConnector came with vLLM 0.9.2 and this one is older",
        "upgrade vLLM, or use pdrelay's connector",
        engines=("vllm",),
        before=(0, 9, 2),
    ),
    Rule(
        "connector_unknown",
        r"Unsupported connector type: (?P<name>[\w.]+)",
        "this vLLM has no connector {name}",
        "correct the name in --kv-transfer-config; one from outside vLLM needs "
        '"kv_connector_module_path" too',
        engines=("vllm",),
    ),
    Rule(
        "connector_constructor",
        r"Connector (?P<name>\w+) uses deprecated 2-argument constructor signature",
        "the constructor of {name} takes (vllm_config, role), and this vLLM passes kv_cache_config "
        "as a third argument",
        "upgrade the package of {name}, or give its constructor the third parameter",
        engines=("vllm",),
    ),
    Rule(
        "connector_constructor",
        r"TypeError: (?P<name>\w*Connector\w*)\.__init__\(\) (?:takes|missing|got)",
        "the constructor of {name} does not fit this vLLM; recent ones pass (vllm_config, role, "
        "kv_cache_config)",
        "use a release of {name} for this vLLM, or a vLLM that it was made for",
        engines=("vllm",),
    ),
    Rule(
        "connector_module",
        r"ModuleNotFoundError: No module named '(?P<name>[\w.]+)'",
        "the connector's module {name} cannot be imported by the engine's Python",
        'correct "kv_connector_module_path"; install the package there or put it on PYTHONPATH',
        near=r"kv_connector/factory\.py|kv_connector_module_path|in get_connector_class",
        engines=("vllm",),
    ),
    Rule(
        "connector_module",
        r"Class (?P<name>\w+) not found in (?P<module>[\w.]+)",
        "the module {module} has no connector {name}",
        'correct "kv_connector" in --kv-transfer-config',
        engines=("vllm",),
    ),
    Rule(
        "kv_config_key",
        r"^\s*(?:kv_rank|kv_parallel_size|kv_ip)$",
        "kv_rank, kv_parallel_size and kv_ip are keys of vLLM's V0 hand-over; 0.32 dropped them",
        "leave them out of --kv-transfer-config",
        engines=("vllm",),
        near=r"KVTransferConfig",
    ),
    Rule(
        "kv_role_missing",
        r"Please specify kv_(?:role|disagg_role) when kv_connector",
        "--kv-transfer-config names a connector without its role",
        'add "kv_role": "kv_producer" on prefill, "kv_consumer" on decode',
        engines=("vllm",),
    ),
    Rule(
        "kv_role_wrong",
        r"Unsupported kv_role: (?P<role>\S+?)\.? ",
        "{role} is no KV role",
        'set "kv_role" to kv_producer, kv_consumer or kv_both',
        engines=("vllm",),
    ),
    Rule(
        "kv_config_not_json",
        r"argument --kv-transfer-config: (?:.*Invalid JSON|.*cannot be converted|invalid)",
        "--kv-transfer-config is not valid JSON",
        'quote it once for the shell: --kv-transfer-config \'{{"kv_connector":"NixlConnector",'
        '"kv_role":"kv_producer"}}\'',
        engines=("vllm",),
    ),
    Rule(
        "kv_config_not_json",
        r"Invalid JSON: ",
        "--kv-transfer-config is not valid JSON",
        'quote it once for the shell: --kv-transfer-config \'{{"kv_connector":"NixlConnector",'
        '"kv_role":"kv_producer"}}\'',
        near=r"--kv-transfer-config|KVTransferConfig",
        engines=("vllm",),
    ),
    Rule(
        "connector_hma",
        r"Connector (?P<name>\w+) does not support HMA but HMA is enabled",
        "{name} cannot move the KV of a hybrid model's several cache groups",
        "add --disable-hybrid-kv-cache-manager to --engine-args",
        engines=("vllm",),
    ),
)

P2P_NCCL_RULES = (
    Rule(
        "http_port_missing",
        r"KeyError: 'http_port'|kv_connector_extra_config\.http_port is required",
        'P2pNcclConnector needs "http_port" in kv_connector_extra_config',
        'add "http_port" with the port that this instance serves HTTP on, as a string',
        engines=("vllm",),
    ),
    Rule(
        "proxy_port_number",
        r'TypeError: can only concatenate str \(not "int"\) to str',
        '"proxy_port" is a number; P2pNcclConnector joins it to "proxy_ip" as text',
        'write "proxy_port": "30001", in quotes, and "http_port" too',
        near=rf"{_P2P}|proxy_ip|proxy_address",
        engines=("vllm",),
    ),
    Rule(
        "kv_port_in_use",
        rf"{_IN_USE} \(addr='tcp://[^']*:14579'\)",
        "another instance already has the default kv_port 14579",
        'give each instance its own "kv_port" in --kv-transfer-config, such as 21001 and 22001',
        engines=("vllm",),
    ),
    Rule(
        "kv_port_in_use",
        rf"{_IN_USE}",
        'another instance already has this "kv_port" (the default is 14579 for all)',
        'give each instance its own "kv_port" in --kv-transfer-config, such as 21001 and 22001',
        near=_P2P,
        engines=("vllm",),
    ),
    Rule(
        "pinned_pool",
        r"(?:RuntimeError|AcceleratorError|OutOfMemoryError|MemoryError).*"
        r"(?:invalid argument|out of memory|alloc|OS call failed|cannot pin|resource)",
        "the connector's pinned host pool (32 GB a rank by default) could not be allocated",
        'lower it with "mem_pool_size_gb": "2" in kv_connector_extra_config, or raise the memory '
        "and locked-memory limits (docker: --ulimit memlock=-1)",
        near=r"tensor_memory_pool|TensorMemoryPool|pin_memory=True",
        engines=("vllm",),
    ),
    Rule(
        "request_id_format",
        r"Request id (?P<id>\S+) does not contain hostname and port",
        "the request did not come through P2pNcclConnector's proxy, which writes both addresses "
        "into the request id",
        "send requests to the proxy, not to an instance",
        engines=("vllm",),
    ),
    Rule(
        "request_id_randomised",
        r"generation throughput: 0\.0 tokens/s, Running: [1-9]",
        "decode waits for KV under another request id: from vLLM 0.14 on each instance appends "
        "its own random suffix to the id that P2pNcclConnector uses as key",
        "set VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1 on both instances, or use another connector",
        anywhere=_P2P,
        engines=("vllm",),
        since=(0, 14, 0),
        before=(0, 24, 0),
        in_info=True,
    ),
)

NIXL_RULES = (
    Rule(
        "nixl_missing",
        r"RuntimeError: NIXL is not available|Please install NIXL|No module named 'nixl",
        "the engine's Python has no usable nixl package",
        "install it there: pip install nixl (its CUDA major version must be torch's), or use "
        "another connector",
    ),
    Rule(
        "nixl_port_in_use",
        rf"{_IN_USE} \(addr='tcp://[^']*:5[56]\d\d'\)",
        "two instances share NIXL's side channel port (5600 by default, 5557 in older releases)",
        "set a distinct VLLM_NIXL_SIDE_CHANNEL_PORT for each instance",
        anywhere=r"(?i)nixl",
        engines=("vllm",),
    ),
    Rule(
        "nixl_port_in_use",
        rf"{_IN_USE}",
        "two instances share NIXL's side channel port",
        "set a distinct VLLM_NIXL_SIDE_CHANNEL_PORT for each instance",
        near=r"(?i)nixl",
        engines=("vllm",),
    ),
    Rule(
        "ucx_transport",
        r"UCX\s+(?:WARN|ERROR).*transports? (?P<names>'[^ ]*cuda[^ ]*) (?:is|are) not available",
        "UCX lacks the transports {names}: it was built without CUDA, or another UCX was loaded",
        "set UCX_TLS=all, and take other UCX installations out of LD_LIBRARY_PATH",
    ),
    Rule(
        "ucx_transport",
        r"UCX\s+ERROR.*(?:no (?:active messages|remote registered memory access|usable) transport"
        r"|no usable transports|Destination is unreachable)",
        "UCX found no transport between the instances among those that UCX_TLS allows",
        "set UCX_TLS=all (or one that includes cuda_ipc, cuda_copy and tcp)",
    ),
    Rule(
        "nixl_backend",
        r"nixlBackendError: (?P<name>NIXL_ERR_\w+)|NIXL backend '(?P<plugin>\w+)' not found",
        "NIXL's backend did not start ({name}{plugin}): most often two UCX installations meet, or "
        "its plug-in directory is not found",
        "set UCX_TLS=all, remove the system's UCX from LD_LIBRARY_PATH (or unset "
        "NIXL_PLUGIN_DIR), and install nixl for torch's CUDA major version",
    ),
    Rule(
        "nixl_handshake",
        r"NIXL compatibility hash mismatch|is not divisible by remote block size",
        "the two instances differ in what decides the KV's layout (version, dtype, block size, "
        "attention backend)",
        "start both with the same vLLM, --dtype, --block-size, --kv-cache-dtype and backend",
        engines=("vllm",),
    ),
    Rule(
        "nixl_wrong_peer",
        r"Remote NIXL agent engine ID mismatch",
        "decode reached another instance than the one that holds the KV: prefill restarted, or "
        "the side channel's host or port leads elsewhere",
        "set VLLM_NIXL_SIDE_CHANNEL_HOST to an address that decode can reach, and a distinct "
        "VLLM_NIXL_SIDE_CHANNEL_PORT for each instance",
        engines=("vllm",),
    ),
    Rule(
        "nixl_transfer",
        r"NIXL transfer failure: (?P<kind>\w+)",
        "a hand-over over NIXL failed ({kind}): the other instance has ended, restarted, or "
        "cannot be reached",
        "read the other instance's log at this time; restart decode too where prefill restarted",
        engines=("vllm",),
        symptom=True,
    ),
)

SGLANG_RULES = (
    Rule(
        "sglang_mooncake_library",
        r"ImportError: (?P<library>lib(?:ibverbs|rdmacm)[\w.]*): cannot open shared object",
        "mooncake is installed, but the system has no {library}",
        "install it (Debian: apt-get install libibverbs1 librdmacm1), or "
        "--disaggregation-transfer-backend nixl",
        near=r"mooncake",
        engines=("sglang",),
    ),
    Rule(
        "sglang_backend_missing",
        r"Please install mooncake|No module named 'mooncake",
        "SGLang's transfer backend mooncake is not installed",
        "pip install mooncake-transfer-engine, or --disaggregation-transfer-backend nixl",
        engines=("sglang",),
    ),
    Rule(
        "sglang_cpu_engine",
        r"No module named 'vllm'",
        "SGLang takes a GPU's kernels on a CPU",
        "set SGLANG_USE_CPU_ENGINE=1 in its environment, beside --device cpu",
        near=r"rotary_embedding",
        engines=("sglang",),
    ),
    Rule(
        "sglang_cpu_host_pool",
        r"Torch not compiled with CUDA enabled",
        "SGLang's decode pins a pool of host memory for retracted requests, which needs CUDA",
        "on a CPU add --disaggregation-decode-retraction-backup cpu_tensor",
        near=r"pool_host",
        engines=("sglang",),
    ),
    Rule(
        "sglang_cpu_overlap",
        r"Tried to instantiate dummy base class Event",
        "SGLang's prefill waits for CUDA's events when its schedule overlaps with the forward pass",
        "on a CPU add --disable-overlap-schedule",
        near=r"disaggregation",
        engines=("sglang",),
    ),
    Rule(
        "sglang_memory",
        r"Not enough memory\. Please try to (?:increase|decrease) --mem-fraction-static",
        "the weights leave no memory for KV under this --mem-fraction-static",
        "raise --mem-fraction-static, free the GPU, or use more GPUs an instance (--tp)",
        engines=("sglang",),
    ),
    Rule(
        "sglang_memory",
        r"The memory capacity is unbalanced",
        "another process already holds memory of one of the GPUs",
        "free the GPUs, or choose others with CUDA_VISIBLE_DEVICES",
        engines=("sglang",),
    ),
    Rule(
        "port_in_use",
        r"(?P<name>\w+) at (?P<port>\d+) is not available in \d+ seconds",
        "port {port} ({name}) is in use",
        "choose another port, or end the process that holds it",
        engines=("sglang",),
    ),
    Rule(
        "sglang_bootstrap",
        r"failed to register to bootstrap server|Could not fetch prefill parallel info"
        r"|Failed to connect to bootstrap server",
        "prefill's bootstrap server cannot be reached",
        "start prefill first; give both sides its host and --disaggregation-bootstrap-port, a "
        "free port of its own for each prefill instance",
        engines=("sglang",),
    ),
    Rule(
        "sglang_rank_failed",
        r"TP rank (?P<rank>\d+) could finish the model loading, but there are other ranks",
        "another rank than {rank} failed or was too slow while it loaded the model",
        "read the other ranks' lines above; free GPU and host memory",
        engines=("sglang",),
        symptom=True,
    ),
    Rule(
        "sglang_transfer",
        r"(?:Decode transfer|Prefill bootstrap|Prefill transfer) failed for request",
        "a hand-over failed: the other instance has ended, restarted, or was slower than the "
        "time limit",
        "read the other instance's log at this time; raise "
        "SGLANG_DISAGGREGATION_WAITING_TIMEOUT when it was only slow",
        engines=("sglang",),
    ),
)

GPU_RULES = (
    Rule(
        "duplicate_gpu",
        r"Duplicate GPU detected ?: ?rank (?P<a>\d+) and rank (?P<b>\d+)",
        "ranks {a} and {b} are on the same GPU, which NCCL refuses",
        "give each instance its own GPU with CUDA_VISIBLE_DEVICES",
    ),
    Rule(
        "gpu_taken",
        r"Free memory on device.*on startup is less than",
        "the GPU is not free: another process, often the other instance, already has its memory",
        "give each instance its own GPU with CUDA_VISIBLE_DEVICES, end what runs there, or lower "
        "--gpu-memory-utilization",
        engines=("vllm",),
    ),
    Rule(
        "gpu_taken",
        r"(?:CUDA-capable device\(s\) is/are busy or unavailable|exclusive-process)",
        "the GPU is in exclusive-process mode and another process holds it",
        "give each instance its own GPU, or 'nvidia-smi -c DEFAULT'",
    ),
    Rule(
        "no_kv_memory",
        r"No available memory for the cache blocks",
        "the weights leave no GPU memory for KV blocks",
        "raise --gpu-memory-utilization, lower --max-num-batched-tokens, or use more GPUs an "
        "instance (--tp)",
        engines=("vllm",),
    ),
    Rule(
        "kv_too_small",
        r"(?:max seq len|model's max seq len) \((?P<len>\d+)\).*(?:KV cache is needed|is larger "
        r"than the maximum number of tokens)",
        "one request of the model's {len} tokens does not fit the KV cache",
        "lower --max-model-len, or raise --gpu-memory-utilization",
    ),
    Rule(
        "cuda_out_of_memory",
        r"CUDA out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation",
        "the GPU's memory is full",
        "give each instance its own GPU, lower --gpu-memory-utilization (SGLang: "
        "--mem-fraction-static), --max-model-len or --max-num-seqs, or use more GPUs",
    ),
    Rule(
        "driver_too_old",
        r"The NVIDIA driver on your system is too old \(found version (?P<found>\d+)\)"
        r"|CUDA driver version is insufficient|(?:forward compatibility was attempted)",
        "the NVIDIA driver is older than torch's CUDA needs",
        "update the driver, or install a torch built for an older CUDA",
    ),
    Rule(
        "no_cuda",
        r"Found no NVIDIA driver|No CUDA GPUs are available|no CUDA-capable device"
        r"|Failed to infer device type|libcuda\.so(?:\.1)?: cannot open",
        "the process sees no GPU",
        "check nvidia-smi and CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all",
    ),
    Rule(
        "wrong_torch_build",
        r"(?:libcudart|libcublas|libcudnn|libnccl|libnvrtc)[\w.-]*: cannot open shared object"
        r"|undefined symbol: \w*(?:c10|torch|cuda|nccl)",
        "compiled parts of the engine were built for another torch or CUDA than is installed",
        "reinstall the engine in a fresh environment, with the torch that it asks for",
    ),
    Rule(
        "flashinfer_missing",
        r"No module named 'flashinfer",
        "vLLM samples with FlashInfer's kernels by default and the engine's Python has no "
        "flashinfer",
        "set VLLM_USE_FLASHINFER_SAMPLER=0 in the environment of the instances, or install the "
        "flashinfer-python that this vLLM asks for",
        near=r"flashinfer_sampler_supported|topk_topp_sampler",
        engines=("vllm",),
    ),
    Rule(
        "no_kernel_image",
        r"no kernel image is available for execution|CUDA capability sm_\d+ is not compatible",
        "torch or the engine has no kernels for this GPU",
        "install a build for the GPU's compute capability, or take another GPU",
    ),
    Rule(
        "peer_access",
        r"peer access is not supported|peer mapping|cudaErrorPeerAccess\w+"
        r"|(?:invalid device context|invalid argument).*cudaIpc|cudaIpcOpenMemHandle",
        "the GPUs of the two instances cannot map each other's memory",
        "choose GPUs that 'nvidia-smi topo -p2p r' shows as OK, run both in one container with "
        "--ipc=host, or use --transport tcp",
    ),
    Rule(
        "nccl_shm",
        r"Error while (?:creating|attaching to) shared memory segment|posix_fallocate failed",
        "/dev/shm is too small for NCCL",
        "start the container with --shm-size=16g or --ipc=host",
    ),
    Rule(
        "nccl_interface",
        r"Bootstrap ?: ?no socket interface found|No (?:IP )?interface found matching|"
        r"NCCL WARN .*no socket interface",
        "NCCL finds no network interface of the name that it was told",
        "unset NCCL_SOCKET_IFNAME, or set it to one that 'ip -br addr' lists, such as lo",
    ),
    Rule(
        "nccl",
        r"NCCL error(?: in)?: |ncclUnhandledCudaError|ncclSystemError|DistBackendError: NCCL",
        "NCCL could not connect the ranks",
        "start again with NCCL_DEBUG=WARN and give 'pdrelay doctor' that log; check /dev/shm and "
        "peer access with 'pdrelay doctor'",
        symptom=True,
    ),
)

MODEL_RULES = (
    Rule(
        "gated_model",
        r"GatedRepoError|Access to model \S+ is restricted|You are trying to access a gated repo"
        r"|401 Client Error.*huggingface",
        "the model needs an accepted licence and a token",
        "accept its licence on the hub, set HF_TOKEN, or give a local directory",
    ),
    Rule(
        "hub_offline",
        r"LocalEntryNotFoundError|OfflineModeIsEnabled|outgoing traffic has been disabled"
        r"|couldn't connect to '?https://huggingface\.co|MaxRetryError.*huggingface"
        r"|Failed to resolve 'huggingface\.co'",
        "the model is not in the local cache and the hub cannot be reached",
        "give a local directory, download it before, or unset HF_HUB_OFFLINE where there is a net",
    ),
    Rule(
        "no_such_model",
        r"Repo id must be in the form|RepositoryNotFoundError|is not a local folder and is not a "
        r"valid model identifier|Can't load the configuration of",
        "there is no such model, neither as a directory nor on the hub",
        "correct MODEL: the path of a directory with config.json, or a hub id",
    ),
    Rule(
        "no_config",
        r"ensure the presence of a 'config\.json'|does not appear to have a file named config\.j",
        "the model directory has no config.json",
        "give the directory that holds config.json, weights and tokenizer",
    ),
    Rule(
        "custom_code",
        r"Please pass the argument `trust_remote_code=True`|contains custom code which must be "
        r"executed|requires you to execute the configuration file",
        "the model brings its own code",
        "add --trust-remote-code to --engine-args if you trust it",
    ),
    Rule(
        "unknown_model_type",
        r"checkpoint you are trying to load has model type [`'](?P<name>\w+)[`']",
        "transformers does not know the model type {name}",
        "upgrade transformers in the engine's Python, or correct config.json",
    ),
    Rule(
        "unsupported_architecture",
        r"Model architectures? \[?(?P<name>'?\w+'?)\]?.*(?:not supported|failed to be inspected)"
        r"|Unsupported architectures?:? (?P<other>.+)",
        "the engine does not support the architecture {name}{other}",
        "use an engine version that supports it",
    ),
    Rule(
        "no_weights",
        r"Cannot find any model weights|No safetensors? (?:weights|files) found|"
        r"no (?:safetensors|weight) files? ",
        "the model directory holds no weights",
        "download the *.safetensors files, or --load-format dummy for random ones",
    ),
    Rule(
        "damaged_weights",
        r"SafetensorError|[Hh]eader(?: too large|TooLarge|TooSmall)|MetadataIncompleteBuffer"
        r"|invalid load key, 'v'",
        "the weight files are damaged, or pointers of Git LFS in place of the files",
        "download them again ('git lfs pull')",
    ),
    Rule(
        "weights_do_not_fit",
        r"(?:size mismatch for|Attempted to load weight|shape .* is invalid for input of size"
        r"|not initialized from checkpoint|There is no module or parameter named)",
        "the weights do not fit config.json",
        "take config.json and weights from the same model",
    ),
    Rule(
        "weights_do_not_fit",
        r"^AssertionError|start \(\d+\) \+ length \(\d+\) exceeds|must match the size of tensor",
        "the weights do not fit config.json",
        "take config.json and weights from the same model",
        near=r"weight_loader|load_weights|default_loader",
    ),
    Rule(
        "no_tokenizer",
        r"Couldn't instantiate the backend tokenizer|Can't load tokenizer for"
        r"|Unrecognized processing class|tokenizer\.json.*(?:not found|No such file)",
        "the model directory has no tokenizer",
        "add tokenizer.json and tokenizer_config.json, or --tokenizer PATH",
    ),
    Rule(
        "context_too_long",
        r"User-specified max_model_len \((?P<asked>\d+)\) is greater than the derived "
        r"max_model_len",
        "--max-model-len {asked} exceeds the model's context",
        "lower it",
    ),
    Rule(
        "heads_not_divisible",
        r"Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel "
        r"size \((?P<size>\d+)\)",
        "{heads} attention heads cannot be split over {size} ranks",
        "choose a --tp that divides {heads}",
    ),
    Rule(
        "unknown_flag",
        r"error: unrecognized arguments: (?P<flags>.+)",
        "this engine version has no flag {flags}",
        "correct --engine-args, or use the engine version that has it",
    ),
    Rule(
        "bfloat16",
        r"Bfloat16 is only supported on GPUs with compute capability",
        "the GPU has no bfloat16",
        "--dtype float16",
    ),
)

HOST_RULES = (
    Rule(
        "too_many_open_files",
        # vLLM quotes this error in a warning at each start
        r"^(?!.*This can cause fd limit errors).*(?:Too many open files|Errno 24\b)",
        "the process ran out of open files",
        "raise the limit with 'ulimit -n 65536' (docker: --ulimit nofile=65536)",
    ),
    Rule(
        "shm_too_small",
        r"Insufficient space in /dev/shm for shared-memory allocation: (?P<need>.+?) required",
        "/dev/shm is too small for the engine's rings between ranks ({need} needed)",
        "start the container with --shm-size=16g or --ipc=host, or empty /dev/shm",
    ),
    Rule(
        "shm_too_small",
        r"No space left on device|Bus error|out of shared memory",
        "/dev/shm is full or too small",
        "start the container with --shm-size=16g or --ipc=host, or empty /dev/shm",
        near=r"(?i)shm|shared_memory|bus error",
    ),
    Rule(
        "disk_full",
        r"No space left on device",
        "a disk is full (model cache, compile cache, or temporary files)",
        "free some space, or move HF_HOME, VLLM_CACHE_ROOT and TMPDIR",
    ),
    Rule(
        "no_loopback",
        r"Unable to find interface for: \[(?:127\.0\.0\.1|::1|localhost)\]",
        "the loopback interface is down or missing",
        "ip link set lo up; a container without a network needs at least lo",
    ),
    Rule(
        "gloo_interface",
        r"(?i)gloo.*(?:Unable to find address for|connectFullMesh|interface)"
        r"|Unable to find (?:address|interface) for: (?P<name>\S+)",
        "gloo cannot use the network interface that it was told",
        "unset GLOO_SOCKET_IFNAME, or set it to one that 'ip -br addr' lists, such as lo",
    ),
    Rule(
        "no_loopback",
        r"EADDRNOTAVAIL|Network is unreachable|Unable to (?:resolve|find).*(?:hostname|address)"
        r"|gaierror|Name or service not known|Temporary failure in name resolution"
        r"|Cannot assign requested address|No such device \(addr=",
        "the host's own name or loopback address cannot be used: IPv6 is half configured, the "
        "name is missing from /etc/hosts, or the loopback interface is down",
        "set VLLM_HOST_IP=127.0.0.1 and GLOO_SOCKET_IFNAME=lo, add the host's name to /etc/hosts, "
        "and check 'ip -br addr show lo'",
        near=r"(?i)gloo|rendezvous|distributed|zmq|socket|get_ip|tcp|ipv6",
    ),
    Rule(
        "port_in_use",
        r"^(?!.*ras/).*(?:\[Errno 98\]|EADDRINUSE|[Aa]ddress already in use"
        r"|error while attempting to bind on address)",
        "a port is in use",
        "choose another with --port, or end the process that holds it ('ss -ltnp')",
    ),
    Rule(
        "host_memory",
        r"DefaultCPUAllocator: (?:can't|not enough).*|(?:^|\s)MemoryError\b|Cannot allocate memory"
        r"|std::bad_alloc|failed to map segment from shared object",
        "the host's memory is used up or limited",
        "stop other processes, raise the container's limit or 'ulimit -v', or ask for a smaller "
        "KV cache",
    ),
    Rule(
        "cpu_kv_space",
        r"on kv cache allocation is less than requested memory for kv",
        "the KV cache asked for is larger than the host's memory",
        "lower VLLM_CPU_KVCACHE_SPACE (GiB)",
        engines=("vllm",),
    ),
    Rule(
        "program_missing",
        r"CalledProcessError: Command '(?P<name>\S+).*exit status 127"
        r"|FileNotFoundError: .*No such file or directory: '(?P<other>lscpu|numactl|nvcc)'",
        "the engine calls the program {name}{other}, which is not on PATH",
        "install it (lscpu is in util-linux), or correct PATH",
    ),
    Rule(
        "no_compiler",
        r"Failed to find C compiler|InvalidCxxCompiler|No working C\+\+ compiler|"
        r"fatal error: Python\.h",
        "the engine compiles kernels at start and finds no compiler or Python headers",
        "install gcc, g++ and the headers of this Python (python3-dev)",
    ),
    Rule(
        "oom_killed",
        r"Out of memory: Killed process|oom-kill|[Ee]xit ?code: -9|Failed core proc\(s\): "
        r"\{[^}]*: -9\b|was killed by SIGKILL|died unexpectedly.*-9",
        "a process was killed with SIGKILL; most often the kernel's OOM killer, because host "
        "memory ran out (P2pNcclConnector alone pins 32 GB a rank)",
        "see 'dmesg -T | grep -i oom'; raise the memory limit, lower the connector's pinned pool "
        "or the number of instances",
        symptom=True,
    ),
)

NATIVE_RULES = (
    Rule(
        "torch_missing",
        r"ModuleNotFoundError: No module named '(?P<name>torch|numpy|safetensors|triton)'",
        "the package {name} is not installed",
        "pip install 'pdrelay[engine]'",
        engines=("native",),
    ),
)

RULES: tuple[Rule, ...] = (
    *CONNECTOR_RULES,
    *P2P_NCCL_RULES,
    *NIXL_RULES,
    *SGLANG_RULES,
    *NATIVE_RULES,
    *GPU_RULES,
    *MODEL_RULES,
    *HOST_RULES,
)

# Looked for only where no rule above and no other exception is found.
LAST_RESORT: tuple[Rule, ...] = (
    Rule(
        "engine_vanished",
        r"Engine core initialization failed|WorkerProc initialization failed"
        r"|Received sigquit from a child process|scheduler (?:is dead|died)",
        "the engine's process ended without a word in this log: it was killed (SIGKILL, most "
        "often the kernel's OOM killer) or crashed in native code",
        "see 'dmesg -T | grep -i -e oom -e segfault'; raise the memory limit, and start again "
        "with PYTHONFAULTHANDLER=1",
        symptom=True,
    ),
)
