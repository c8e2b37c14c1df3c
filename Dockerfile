# docker build -t btlog .
# docker run -p 127.0.0.1:8080:8080 -v btlog:/data btlog serve --host 0.0.0.0 --open-writes
FROM python:3.13-slim
# By hash, so that nobody can put something else in their place: the wheels for glibc on x86_64 and aarch64, those of
# cffi for Python 3.11 to 3.14.
RUN printf '%s\n' >/tmp/requirements \
        'PyNaCl==1.6.2 --hash=sha256:22de65bb9010a725b0dac248f353bb072969c94fa8d6b1f34b87d7953cf7bbe4 \' \
        '    --hash=sha256:8845c0631c0be43abdd865511c41eab235e0be69c81dc66a50911594198679b0' \
        'cffi==2.1.1 --hash=sha256:34e261f78cb6ceaaa36f42f2613f4380d94d9c759a9c73c769ee6e0247364632 \' \
        '    --hash=sha256:3311ed60d36f83378794e1009ac6258bafbf81f7888b4caa7b35a521e3f95813 \' \
        '    --hash=sha256:c1453022f490d2459a11819d83ad1d586e9ff65a12ac3e705ffebd46d3685dcf \' \
        '    --hash=sha256:68e62fe11f30d5ca8289242866f0a5291402d8529ca2178ab8afc5c9694ae890 \' \
        '    --hash=sha256:a931079504ecc49efed7744c476a5c343a92fabf66dec2db95edb1b2fdc770e2 \' \
        '    --hash=sha256:f16c709686a78c727bbbf059f92b0bf41c6fc60deec706d2dc19f529175a6125 \' \
        '    --hash=sha256:b0431303acaea1089ad4b3e9ce4e6518193def1118d4073ca848635ee4ea2e96 \' \
        '    --hash=sha256:58acb8ab8e295e6c5ea12f888cbb13cf21511ef2a3303a23f4325c29d17fe5c1' \
        'pycparser==3.12 --hash=sha256:a076f3f489b39b43ed13563a1dafe42447445bec2e294154ec5c57fcdda4c85e' \
    && pip install --no-cache-dir --disable-pip-version-check --require-hashes --only-binary :all: \
        -r /tmp/requirements \
    && rm /tmp/requirements \
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
