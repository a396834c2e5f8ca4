# laptop on the CPU, with all extras. By itself it runs the short whole job:
#
#   docker build --build-arg TORCH_INDEX=URL -t laptop .     URL: PyTorch's index of CPU builds;
#                                                            without it comes the large CUDA build
#   docker run --rm laptop
#   docker run --rm --user "$(id -u)" -v "$PWD:/out" laptop generate tiny-sdxl "a red circle" -o a.png
FROM python:3.12-slim
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=

# torch first: it is large and changes seldom
RUN python -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
WORKDIR /src
COPY . .
RUN python -m pip install --no-cache-dir '.[all]'

# any user can write here, so that --user works
RUN mkdir -m 777 /out /home/laptop
ENV HOME=/home/laptop USER=laptop
USER 1000
WORKDIR /out
ENTRYPOINT ["laptop"]
CMD ["compress", "--model", "tiny-sdxl", "--ratio", "0.5", "--to", "onnx,coreml", "--smoke", "-o", "run"]
