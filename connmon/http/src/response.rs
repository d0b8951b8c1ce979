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
        let mut headers = HeaderMap::with_capacity(12);
        for (name, value) in [
            (CONTENT_TYPE, content_type),
            (CACHE_CONTROL, "no-store"),
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (X_FRAME_OPTIONS, "deny"),
            (REFERRER_POLICY, "no-referrer"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        Self {
            status,
            headers,
            body,
        }
    }

    /// One line of text.
    pub(crate) fn line(status: StatusCode, line: impl std::fmt::Display) -> Self {
        Self::new(status, TEXT, format!("{line}\n").into())
    }

    /// 503 and when to ask again.
    pub(crate) fn unavailable(line: impl std::fmt::Display) -> Self {
        Self::line(StatusCode::SERVICE_UNAVAILABLE, line).with(RETRY_AFTER, "1")
    }

    /// 405 and what is allowed.
    pub(crate) fn method_not_allowed() -> Self {
        Self::line(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET and HEAD are allowed",
        )
        .with(ALLOW, "GET, HEAD")
    }

    /// 401 and how to come in.
    pub(crate) fn unauthorized() -> Self {
        Self::line(StatusCode::UNAUTHORIZED, "Unauthorized").with(WWW_AUTHENTICATE, "Basic")
    }

    /// 429.
    pub(crate) fn too_many_requests() -> Self {
        Self::line(StatusCode::TOO_MANY_REQUESTS, "Too Many Requests")
    }

    /// 400, after which the connection is closed.
    pub(crate) fn bad_request(line: &'static str) -> Self {
        Self::line(StatusCode::BAD_REQUEST, line).with(CONNECTION, "close")
    }

    /// 431 and what fits.
    pub(crate) fn header_too_large(limits: &Limits) -> Self {
        let (bytes, fields) = (limits.header_bytes, limits.header_fields);
        let line = format!("the request's header has more than {bytes} bytes or {fields} fields");
        Self::line(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, line)
    }

    /// A request with a body.
    pub(crate) fn body_refused() -> Self {
        Self::line(
            StatusCode::PAYLOAD_TOO_LARGE,
            "a request to this server has no body",
        )
        .with(CONNECTION, "close")
    }

    pub(crate) fn with(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.insert(name, HeaderValue::from_static(value));
        self
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

    /// Keeps what a HEAD asks for: the headers a GET would get, its
    /// `Content-Length` included, and no body.
    pub(crate) fn without_body(mut self) -> Self {
        self.headers
            .insert(CONTENT_LENGTH, HeaderValue::from(self.body.len()));
        self.body = Bytes::new();
        self
    }

    /// The whole response as sent over HTTP/1 where hyper sends none; the
    /// connection is closed after it.
    pub(crate) fn into_closing_bytes(self) -> Vec<u8> {
        let date = httpdate::fmt_http_date(SystemTime::now());
        let length = self.body.len();
        let mut bytes = format!(
            "HTTP/1.1 {}\r\ndate: {date}\r\ncontent-length: {length}\r\n",
            self.status
        )
        .into_bytes();
        let mut headers = self.headers;
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        for (name, value) in &headers {
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                bytes.extend_from_slice(part);
            }
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&self.body);
        bytes
    }
}
