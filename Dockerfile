# docker build -t nanogpt-speedrun .
# docker run --rm nanogpt-speedrun                                # nano, on the CPU
# docker run --rm --gpus all --ipc=host \
#     -v "$PWD/data/fineweb10B:/speedrun/data/fineweb10B" -v "$PWD/logs:/speedrun/logs" nanogpt-speedrun small
#
# A plain Python base is enough: torch's wheels bring the CUDA libraries, the host its driver.
FROM python:3.12-slim-bookworm

# torch.compile builds C++ on a CPU, and Triton C on a GPU; the build tools are all that is missing for it.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /speedrun

# Before the sources: gigabytes that only a change of the pins downloads again.
COPY requirements.txt requirements-gpu.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-gpu.txt

COPY . .

# "utility" is nvidia-smi, by which run.sh finds the GPUs.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONUNBUFFERED=1
ENTRYPOINT ["./run.sh"]
