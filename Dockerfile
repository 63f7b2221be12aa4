# commopt on the CPU, for an ordinary user. With CUDA: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Emulated links need user namespaces, which Docker's default seccomp profile forbids: docker run --security-opt seccomp=unconfined
# --security-opt apparmor=unconfined ..., or let `emulate: auto` fall back to pacing.
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends iproute2 util-linux && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home commopt
WORKDIR /home/commopt/src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY commopt commopt
COPY launch launch
COPY configs configs
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0 && pip install --no-cache-dir .
USER commopt
ENTRYPOINT ["commopt"]
CMD ["--help"]
