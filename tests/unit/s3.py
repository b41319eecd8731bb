"""A real S3 server on loopback (moto's), which can be stopped and started again, or be told to misbehave."""

import threading
import time
import uuid

import requests
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

KEY, SECRET = "test-key-of-nobody", "secret-that-nobody-may-see"


class _Quiet(WSGIRequestHandler):
    def log(self, *words):
        pass


class S3:
    """A server with one bucket.

    Attributes:
        faults: (method, ending of the path, "status 503" or "slow") of requests that go wrong, once each.
        always: the same for every request; "" for none.
        log: (method, path) of every request.
    """

    def __init__(self):
        self.faults, self.log, self.always = [], [], ""
        self.bucket = f"bucket-{uuid.uuid4().hex[:8]}"
        self.port, self._server = 0, None
        self._app = DomainDispatcherApplication(create_backend_app)
        self._ended = threading.Event()
        self.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    @property
    def url(self):
        return f"s3://{self.bucket}/runs"

    def start(self):
        """Serve, on the same port as before."""
        self._ended.clear()
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def make_bucket(self):
        """Make the bucket as a client of any kind would."""
        headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request"}
        requests.put(f"http://127.0.0.1:{self.port}/{self.bucket}", headers=headers, timeout=10).raise_for_status()

    def objects(self):
        """Return the paths of all objects in the bucket."""
        backend = s3_backends["123456789012"]["aws"]
        return sorted(backend.buckets[self.bucket].keys.keys()) if self.bucket in backend.buckets else []

    def get(self, key):
        """Return the bytes of an object."""
        return s3_backends["123456789012"]["aws"].get_object(self.bucket, key).value

    def put(self, key, data):
        """Put an object, as somebody who is no run."""
        backend = s3_backends["123456789012"]["aws"]
        backend.put_object(self.bucket, key, data)

    def delete(self, key):
        """Take an object away."""
        s3_backends["123456789012"]["aws"].delete_object(self.bucket, key)

    def stop(self):
        """Serve nothing; what was stored stays."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.log.append((method, path))
        if self.always:
            start_response(f"{self.always.split()[1]} Fault", [("Content-Length", "0")])
            return [b""]
        for fault in self.faults:
            if fault[0] == method and path.endswith(fault[1]):
                self.faults.remove(fault)
                if fault[2].startswith("status"):
                    start_response(f"{fault[2].split()[1]} Fault", [("Content-Length", "0")])
                    return [b""]
                if fault[2] == "slow":
                    time.sleep(1)
        return self._app(environ, start_response)
