# syntax=docker/dockerfile:1
# evertune on GPUs (torch from PyPI brings CUDA with it), for `docker run`, Kubernetes, apptainer and pyxis:
#
#   docker build -t evertune .
#   docker run --gpus all --shm-size 16g -v "$PWD:/work" evertune fit --config stream.yaml
#
#   --build-arg EXTRAS=lightning,deepspeed,live,serve,s3   what of evertune's extras is in it
#   --build-arg PIP_EXTRA_INDEX_URL=...           where else pip looks, for example for torch without CUDA
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# g++ compiles an op of DeepSpeed's at its first use, and what torch.compile makes
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/*

# Gigabytes that change with pyproject.toml only: a package without code asks for all of them.
FROM base AS dependencies
ARG EXTRAS=lightning,deepspeed,live,serve,reports
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /source
COPY pyproject.toml ./
RUN mkdir evertune && touch evertune/__init__.py README.md LICENSE && python -m venv /opt/venv
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ".[${EXTRAS}]" && pip uninstall --yes evertune

FROM base AS wheel
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY evertune ./evertune
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base
COPY --from=dependencies /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps --no-index --no-cache-dir /wheels/*.whl
RUN useradd --uid 1000 --create-home evertune && install --directory --owner=evertune --group=evertune /work
USER 1000:1000
WORKDIR /work
# tini passes SIGTERM on, which the first process of a container would ignore, and collects what has ended.
ENTRYPOINT ["tini", "--", "evertune"]
CMD ["--help"]
