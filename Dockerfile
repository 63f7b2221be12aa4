# commopt for an ordinary user, on the CPU:    docker build -t commopt:0.2 .
# With CUDA:    docker build -t commopt:0.2-cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Emulated links need user namespaces, which Docker's default seccomp profile forbids: docker run --security-opt seccomp=unconfined
# --security-opt apparmor=unconfined ..., or let `emulate: auto` fall back to pacing.
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_VERSION=2.13.0
RUN apt-get update && apt-get install -y --no-install-recommends iproute2 util-linux && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch==$TORCH_VERSION"
COPY setup.py setup.cfg pyproject.toml README.md LICENSE /tmp/src/
COPY commopt /tmp/src/commopt
COPY launch /tmp/src/launch
COPY configs /tmp/src/configs
WORKDIR /opt/commopt
RUN pip install --no-cache-dir /tmp/src && mv /tmp/src/launch /tmp/src/configs . && rm -r /tmp/src && useradd --create-home --uid 1000 commopt
USER 1000:1000
ENV PYTHONUNBUFFERED=1
# Compiled here, the kernels are ready on machines with the same kind of CPU; others compile them at the first start.
RUN python -c "from commopt.run.prepare import prepare_all; prepare_all()"
ENTRYPOINT ["commopt"]
CMD ["--help"]
