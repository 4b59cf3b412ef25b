# steep in a container: `docker build -t steep .`, then `docker run --rm -v "$PWD:/work" steep train run.yaml`.
# Add `--gpus all` for a GPU. With --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu torch is the CPU's build, which
# is gigabytes smaller. The image runs as a user of its own: pass --user "$(id -u):$(id -g)" so that the run's files are yours.
ARG BASE=python:3.13-slim
FROM ${BASE}

ARG TORCH_INDEX_URL=
ARG EXTRAS=gguf,fast,tensorboard
RUN python3 -m venv /opt/steep
ENV PATH=/opt/steep/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch first and alone, at its pinned version: this layer changes seldom, and nothing later replaces it.
COPY constraints.txt /tmp/steep/
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep -E '^torch==' /tmp/steep/constraints.txt)"

COPY pyproject.toml README.md LICENSE /tmp/steep/
COPY src /tmp/steep/src
RUN pip install --constraint /tmp/steep/constraints.txt "/tmp/steep[$EXTRAS]" && rm -rf /tmp/steep

# Caches of models and of prepared text lie in one place, which a volume can keep.
ENV HF_HOME=/cache/huggingface STEEP_CACHE=/cache/steep MPLCONFIGDIR=/cache/matplotlib
RUN mkdir -p /cache /work && chmod 1777 /cache /work && useradd --create-home steep
USER steep
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["steep"]
CMD ["--help"]
