#!/usr/bin/env bash
# Every figure that this project publishes for a host with GPUs, one step after the other:
#
#     benchmarks/gpu_figures.sh OUT [STEP...]      no step: all; a step that fails stops none
#
#   lab         idle latency, interference and fixed rates: native and vLLM, P/D and one instance, NIXL
#   lab-more    the same run goes on with TP=2 and two replicas of both
#   sglang      and with SGLang's P/D and one instance (SGLANG_ARGS: its --engine-args)
#   kv          experiment 5: transfers by length and transport, beside prefill
#   transports  bulk copies beside the link's peak
#   paced       the decode side alone, over a prefill that computes nothing; one GPU is enough
#   stall       what vLLM's streams lose when a prompt begins whose KV is there; one GPU is enough
#   tp          a step of TP=2 beside its floor
#   client      `vllm bench serve` and `pdrelay bench` against one server
#   tests       what needs GPUs, in one process
#
# Of a host with one GPU, all instances share it: there is no lab-more, no tp, no NIXL in `lab` (between
# two processes on one GPU it takes seconds), and of the cases those that one GPU can serve.
#
# MODEL, DEVICE, PYTHON, GPUS (how many, else counted), LAB_S (seconds of each lab step) and MORE
# (further arguments of the lab) may be set. Engines that PYTHON's environment lacks are named in the
# report's notes; one with an environment of its own: MORE="--engine-python sglang=PATH".
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:?usage: benchmarks/gpu_figures.sh OUT [STEP...]}
shift
model=${MODEL:-llama-3.1-8b} device=${DEVICE:-cuda} python=${PYTHON:-python3} lab_s=${LAB_S:-580}
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"

if [ "$gpus" -gt 1 ]; then
    steps=(lab lab-more sglang kv transports paced stall tp client tests)
    topologies=native/pd:1:1,vllm/pd:1:1,vllm/replicas:1,native/replicas:1,vllm+nixl/pd:1:1
    cases='idle,interference,streams-*,*pd-1-1/fixed,*-2/fixed,*pd-1-1/long-short,*-2/long-short'
    place=() kv_transports=mapped,nccl
else
    steps=(lab sglang kv transports paced stall client tests)
    topologies=native/pd:1:1,vllm/pd:1:1,vllm/replicas:1,native/replicas:1
    cases='idle,interference,streams-*'
    place=(--allow-oversubscribe) kv_transports=mapped
    [ "$device" = cpu ] || place+=(--kv-cache-memory 16GiB)
fi

lab() {
    # vLLM captures 51 graphs by default: these cover every batch of the lab's, and half the start.
    # shellcheck disable=SC2086  # MORE is several words
    "$python" -m pdrelay lab --quick --model "$model" --device "$device" \
        --gpu-memory-utilization 0.85 "${place[@]}" \
        --engine-args 'vllm=--max-num-seqs 128 --cudagraph-capture-sizes 1 2 4 8 16 24 32 40 48 56 64 72 80 96 112 128 144 256 512' \
        --cases "$cases" --time-limit "$lab_s" --out "$out/lab" ${MORE:-} "$@"
}

step() {
    case $1 in
    lab) lab --topologies "$topologies" ;;
    lab-more) lab --add --topologies native/tp:2,native/replicas:2,vllm/tp:2,vllm/replicas:2 ;;
    sglang)
        lab --add --engine-args "sglang=${SGLANG_ARGS:-}" \
            --topologies sglang/pd:1:1,sglang/replicas:1
        ;;
    kv)
        "$python" -m pdrelay kv "$model" --device "$device" --lengths 512,2048,8192 \
            --block-sizes 64 --transport "$kv_transports" --repeats 12 --serve-requests 12 \
            --out "$out/kv"
        ;;
    transports)
        "$python" benchmarks/transports.py --device "$device" --transports mapped --seconds 40
        ;;
    paced)
        local kv=()  # a prefill rank without a model cannot measure what is left beside it
        [ "$device" = cpu ] || kv=(--kv-cache-memory 16GiB)
        "$python" benchmarks/paced_prefill.py --quick --topologies pd:1:1 --cases idle,interference \
            --model "$model" --device "$device" "${place[@]}" "${kv[@]}" --out "$out/paced" &&
            "$python" benchmarks/hand_over_stages.py "$out/paced"
        ;;
    stall)
        "$python" benchmarks/vllm_api_stall.py --python "$(command -v "$python")" --model "$model" \
            --streams 16 --lengths 8192 --prompts 30
        ;;
    tp) "$python" benchmarks/gpu_tp_step.py --model "$model" --seconds 120 ;;
    client)
        "$python" benchmarks/client_agreement.py --model "$model" --device "$device" --rounds 1 \
            --rate 10 --num-prompts 60 --input-len 512 --output-len 64
        ;;
    tests)
        "$python" -m pytest -q tests/engine/test_fa3_attention.py tests/engine/test_cuda_tp.py \
            tests/engine/test_triton_decode.py tests/engine/test_cuda_gpu.py tests/transport/test_cuda_ipc.py \
            tests/transport/test_nccl.py tests/integrations/test_vllm_device_pages.py \
            tests/e2e/test_gpu_identity.py tests/e2e/test_gpu_failures.py
        ;;
    *)
        echo "no step $1: see the head of ${BASH_SOURCE[0]}" >&2
        return 2
        ;;
    esac
}

[ $# -gt 0 ] || set -- "${steps[@]}"
status=0
for name in "$@"; do
    echo "== $name"
    began=$SECONDS
    step "$name" 2>&1 | tee "$out/$name.txt"
    ended=${PIPESTATUS[0]}
    echo "== $name ended with $ended after $((SECONDS - began)) s"
    [ "$ended" -eq 0 ] || status=1
done
exit "$status"
