//! Responses: status, headers that every one carries, and bodies by method.

use std::time::SystemTime;

use bytes::Bytes;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_SECURITY_POLICY,
    CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY, RETRY_AFTER, VARY, WWW_AUTHENTICATE,
    X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use hyper::{HeaderMap, StatusCode};

use crate::limits::Limits;

/// The text format's full media type; Prometheus 3 fails a scrape without
/// one, and nothing here is OpenMetrics, whatever the client would accept.
pub(crate) const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
pub(crate) const TEXT: &str = "text/plain; charset=utf-8";
pub(crate) const JSON: &str = "application/json; charset=utf-8";

/// Only what this server itself serves, and no frame around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self' data:; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'";

/// A response before it is tied to a connection.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Reply {
    pub(crate) fn new(status: StatusCode, content_type: &'static str, body: Bytes) -> Self {
        let reply = Self {
            status,
            headers: HeaderMap::with_capacity(12),
            body,
        };
        reply
            .with(CONTENT_TYPE, content_type)
            .with(CACHE_CONTROL, "no-store")
            .with(CONTENT_SECURITY_POLICY, POLICY)
            .with(X_CONTENT_TYPE_OPTIONS, "nosniff")
            .with(X_FRAME_OPTIONS, "deny")
            .with(REFERRER_POLICY, "no-referrer")
    }

    pub(crate) fn with(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.insert(name, HeaderValue::from_static(value));
        self
    }

    /// One line of text.
    pub(crate) fn line(status: StatusCode, line: impl std::fmt::Display) -> Self {
        Self::new(status, TEXT, format!("{line}\n").into())
    }

    /// 503.
    pub(crate) fn unavailable(line: impl std::fmt::Display) -> Self {
        Self::line(StatusCode::SERVICE_UNAVAILABLE, line).with(RETRY_AFTER, "1")
    }

    pub(crate) fn method_not_allowed() -> Self {
        let line = "only GET and HEAD are allowed";
        Self::line(StatusCode::METHOD_NOT_ALLOWED, line).with(ALLOW, "GET, HEAD")
    }

    pub(crate) fn unauthorized() -> Self {
        Self::line(StatusCode::UNAUTHORIZED, "Unauthorized").with(WWW_AUTHENTICATE, "Basic")
    }

    pub(crate) fn too_many_requests() -> Self {
        Self::line(StatusCode::TOO_MANY_REQUESTS, "Too Many Requests")
    }

    /// 400, after which the connection is closed.
    pub(crate) fn bad_request(line: &'static str) -> Self {
        Self::line(StatusCode::BAD_REQUEST, line).with(CONNECTION, "close")
    }

    pub(crate) fn header_too_large(limits: &Limits) -> Self {
        let (bytes, fields) = (limits.header_bytes, limits.header_fields);
        let line = format!("the request's header has more than {bytes} bytes or {fields} fields");
        Self::line(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, line)
    }

    /// 413, after which the connection is closed.
    pub(crate) fn body_refused() -> Self {
        let line = "a request to this server has no body";
        Self::line(StatusCode::PAYLOAD_TOO_LARGE, line).with(CONNECTION, "close")
    }

    /// Marks a body that exists plain and compressed.
    pub(crate) fn negotiated(self, gzip: bool) -> Self {
        let this = self.with(VARY, "accept-encoding");
        if gzip {
            this.with(CONTENT_ENCODING, "gzip")
        } else {
            this
        }
    }

    /// The answer to HEAD: the headers of the GET, its `Content-Length`
    /// included, and no body.
    pub(crate) fn without_body(mut self) -> Self {
        let length = std::mem::take(&mut self.body).len();
        self.headers.insert(CONTENT_LENGTH, length.into());
        self
    }

    /// The whole response as sent over HTTP/1 where hyper sends none; the
    /// connection is closed after it.
    pub(crate) fn into_closing_bytes(self) -> Vec<u8> {
        let (status, length) = (self.status, self.body.len());
        let date = httpdate::fmt_http_date(SystemTime::now());
        let mut bytes =
            format!("HTTP/1.1 {status}\r\ndate: {date}\r\ncontent-length: {length}\r\n")
                .into_bytes();
        let reply = self.with(CONNECTION, "close");
        for (name, value) in &reply.headers {
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                bytes.extend_from_slice(part);
            }
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&reply.body);
        bytes
    }
}
