//! What answers requests: the route table ([`App::reply`]), and the reply of
//! each route. All but the two health paths need the access that the web
//! configuration asks for. docs/web.md has the table for users.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CACHE_CONTROL, CONNECTION, HOST};
use hyper::http::uri::Authority;
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::connections::{Connection, Connections};
use crate::encoding::{self, WORTH_COMPRESSING, wants_gzip};
use crate::render_queue::{RenderQueue, Want};
use crate::response::{JSON, METRICS, Reply};
use crate::stream::Payload;
use crate::webconfig::{Access, WebConfig};
use crate::{Asset, Content, lock};

/// How long "ready" is repeated without another question to the fold, so that
/// probing it, which needs no credentials, costs the fold nothing.
const READY_KEPT: Duration = Duration::from_secs(1);

/// Compressed files of the page kept; the page has a handful.
const ASSETS_KEPT: usize = 32;

/// How long a scrape waits for the place of a closed connection, which is free
/// as soon as its task has run.
const PERMIT_TIME: Duration = Duration::from_millis(100);

pub(crate) struct App {
    pub(crate) telemetry_path: String,
    /// Places for scrapes in flight; `None` is unlimited.
    pub(crate) permits: Option<Arc<Semaphore>>,
    pub(crate) max_requests: usize,
    pub(crate) queue: RenderQueue,
    pub(crate) content: Arc<Mutex<dyn Content>>,
    pub(crate) web_config: Option<Arc<WebConfig>>,
    pub(crate) connections: Arc<Connections>,
    /// Files of the page that were asked for, with their compressed form.
    pub(crate) assets: Mutex<HashMap<String, (Asset, Bytes)>>,
    /// When the agent was last known to be ready.
    pub(crate) ready_at: Mutex<Option<Instant>>,
}

/// A reply, with the place of a scrape in flight where it has one.
type ReplyAndPermit = (Reply, Option<OwnedSemaphorePermit>);

impl App {
    pub(crate) fn is_tls(&self) -> bool {
        self.web_config.as_ref().is_some_and(|it| it.is_tls())
    }

    /// `reply` with the headers of the web configuration.
    pub(crate) fn with_configured_headers(&self, mut reply: Reply) -> Reply {
        if let Some(web_config) = &self.web_config {
            web_config.set_headers(&mut reply.headers);
        }
        reply
    }

    pub(crate) async fn handle(
        &self,
        request: Request<Incoming>,
        connection: &Arc<Connection>,
    ) -> Result<Response<Payload>, Infallible> {
        let in_flight = connection.request();
        let (reply, permit) = match self.refusal(&request, connection).await {
            Some(reply) => (reply, None),
            None => {
                in_flight.allowed();
                self.reply(&request, connection).await
            }
        };
        let mut reply = self.with_configured_headers(reply);
        if request.method() == Method::HEAD {
            reply = reply.without_body();
        }
        if request.version() >= Version::HTTP_2 {
            reply.headers.remove(CONNECTION);
        }
        log::debug!(
            "{} {} {}",
            request.method(),
            request.uri().path().escape_debug(),
            reply.status.as_u16()
        );
        in_flight.response_begins(permit);
        let body = Payload::new(reply.body, request.version(), in_flight);
        let mut response = Response::new(body);
        *response.status_mut() = reply.status;
        *response.headers_mut() = reply.headers;
        Ok(response)
    }

    /// Why the request is not answered, if it is not.
    async fn refusal(&self, request: &Request<Incoming>, connection: &Connection) -> Option<Reply> {
        if !names_one_host(request) {
            let line = "the request has no Host header, more than one, or one that names no host";
            return Some(Reply::bad_request(line));
        }
        let needs_access = !matches!(request.uri().path(), "/-/healthy" | "/-/ready");
        if let Some(web_config) = self.web_config.as_ref().filter(|_| needs_access) {
            match web_config
                .access(request.headers(), connection.client)
                .await
            {
                Access::Allowed => {}
                Access::RateLimited => return Some(Reply::too_many_requests()),
                Access::Unauthorized => return Some(Reply::unauthorized()),
                Access::Busy => {
                    let line = "too many credentials are being checked; retry later";
                    return Some(Reply::unavailable(line));
                }
            }
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Some(Reply::method_not_allowed());
        }
        (!request.body().is_end_stream()).then(Reply::body_refused)
    }

    async fn reply(&self, request: &Request<Incoming>, connection: &Connection) -> ReplyAndPermit {
        let gzip = wants_gzip(request.headers());
        match request.uri().path() {
            "/-/healthy" => (Reply::line(StatusCode::OK, "connmon is healthy"), None),
            "/-/ready" => (self.readiness().await, None),
            path if path == self.telemetry_path => {
                self.scrape(Want::Metrics, gzip, METRICS, connection).await
            }
            "/api/v1/summary" => self.scrape(Want::Summary, gzip, JSON, connection).await,
            path => (self.page(path, gzip), None),
        }
    }

    async fn readiness(&self) -> Reply {
        let known = *lock(&self.ready_at);
        if known.is_none_or(|at| at.elapsed() >= READY_KEPT) {
            if let Err(line) = self.queue.ask(Want::Readiness, false).await {
                return Reply::unavailable(line);
            }
            *lock(&self.ready_at) = Some(Instant::now());
        }
        Reply::line(StatusCode::OK, "connmon is ready")
    }

    /// An answer out of the report. The permit goes with the response: a
    /// scrape is in flight until its last byte is sent.
    async fn scrape(
        &self,
        want: Want,
        gzip: bool,
        content_type: &'static str,
        connection: &Connection,
    ) -> ReplyAndPermit {
        let mut permit = None;
        if let Some(permits) = &self.permits {
            permit = self.permit(permits, connection).await;
            if permit.is_none() {
                let line = format!(
                    "limit of concurrent requests reached ({}, --web.max-requests); retry later",
                    self.max_requests
                );
                return (Reply::unavailable(line), None);
            }
        }
        let reply = match self.queue.ask(want, gzip).await {
            Ok((body, gzip)) => Reply::new(StatusCode::OK, content_type, body).negotiated(gzip),
            Err(line) => Reply::unavailable(line),
        };
        (reply, permit)
    }

    /// A place among the scrapes in flight, if need be that of a client that
    /// has been reading its answer for too long.
    async fn permit(
        &self,
        permits: &Arc<Semaphore>,
        connection: &Connection,
    ) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
            return Some(permit);
        }
        if !self.connections.close_slow_reader(connection.client) {
            return None;
        }
        let permit = Arc::clone(permits).acquire_owned();
        tokio::time::timeout(PERMIT_TIME, permit).await.ok()?.ok()
    }

    fn page(&self, path: &str, wants_gzip: bool) -> Reply {
        let mut assets = lock(&self.assets);
        if !assets.contains_key(path) {
            let content = lock(&self.content);
            let Some(asset) = content.asset(path) else {
                return Reply::line(StatusCode::NOT_FOUND, "no such page");
            };
            if assets.len() >= ASSETS_KEPT {
                assets.clear();
            }
            let compressed = encoding::gzip(&asset.body, Compression::best());
            assets.insert(path.to_owned(), (asset, compressed));
        }
        let (asset, compressed) = &assets[path];
        let worth = asset.body.len() >= WORTH_COMPRESSING && compressed.len() < asset.body.len();
        let gzip = wants_gzip && worth;
        let body = if gzip { compressed } else { &asset.body };
        Reply::new(StatusCode::OK, asset.content_type, body.clone())
            .negotiated(gzip)
            .with(CACHE_CONTROL, "no-cache")
    }
}

/// Whether the request has the `Host` that RFC 9112, 3.2 asks for: exactly
/// one, if only an empty one, and over HTTP/1.0 and HTTP/2 at most one.
fn names_one_host(request: &Request<Incoming>) -> bool {
    let mut hosts = request.headers().get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => request.version() != Version::HTTP_11,
        (Some(host), None) => host.to_str().is_ok_and(is_host),
        (Some(_), Some(_)) => false,
    }
}

/// `uri-host [ ":" port ]` of RFC 9110, or nothing.
fn is_host(text: &str) -> bool {
    let is_port = |text: &str| text.bytes().all(|digit| digit.is_ascii_digit());
    text.is_empty()
        || text.parse::<Authority>().is_ok_and(|authority| {
            let rest = text.strip_prefix(authority.host());
            rest.is_some_and(|rest| rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port))
        })
}

#[cfg(test)]
mod tests;
