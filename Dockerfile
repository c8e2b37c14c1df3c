# docker build -t btlog .
# docker run -p 127.0.0.1:8080:8080 -v btlog:/data btlog serve --host 0.0.0.0 --open-writes
FROM python:3.13-slim
RUN pip install --no-cache-dir --disable-pip-version-check PyNaCl==1.6.2 \
    && useradd --uid 10001 --home-dir /data btlog \
    && install -d -o btlog -g btlog -m 0700 /data
COPY --chmod=0644 btlog.py /usr/local/lib/btlog.py
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER btlog
WORKDIR /data
VOLUME /data
EXPOSE 8080 8081
HEALTHCHECK --interval=30s --timeout=6s --start-period=10s \
    CMD ["python", "/usr/local/lib/btlog.py", "health", "http://127.0.0.1:8080", "http://127.0.0.1:8081"]
ENTRYPOINT ["python", "/usr/local/lib/btlog.py"]
CMD ["--help"]
