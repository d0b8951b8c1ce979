//! What answers requests: the route table, and what each route says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CACHE_CONTROL, HOST};
use hyper::http::uri::Authority;
use hyper::{Method, Request, Response, StatusCode, Version, header};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::connections::{Connections, Watch};
use crate::encoding::{WORTH_COMPRESSING, gzip_small, wants_gzip};
use crate::render_queue::{Answer, Desk, Want};
use crate::response::{JSON, METRICS, Reply};
use crate::stream::Payload;
use crate::webconfig::{Access, WebConfig};
use crate::{Asset, Content};

/// How long "ready" is repeated without asking the fold again, so that
/// probing it, which needs no credentials, costs the fold nothing.
const READY_KEPT: Duration = Duration::from_secs(1);

/// Compressed files of the page kept; the page has a handful.
const ASSETS_KEPT: usize = 32;

/// What answers requests.
pub(crate) struct App {
    pub(crate) telemetry_path: String,
    pub(crate) permits: Option<Arc<Semaphore>>,
    pub(crate) max_requests: usize,
    pub(crate) desk: Desk,
    pub(crate) content: Arc<Mutex<dyn Content>>,
    pub(crate) web_config: Option<Arc<WebConfig>>,
    pub(crate) connections: Arc<Connections>,
    /// Files of the page that were asked for, with their compressed form.
    pub(crate) assets: Mutex<HashMap<String, (Asset, Bytes)>>,
    /// When the agent was last known to be ready.
    pub(crate) ready_at: Mutex<Option<Instant>>,
}

enum Route {
    Healthy,
    Ready,
    Telemetry,
    Summary,
    Page,
}

impl App {
    fn route(&self, path: &str) -> Route {
        match path {
            "/-/healthy" => Route::Healthy,
            "/-/ready" => Route::Ready,
            path if path == self.telemetry_path => Route::Telemetry,
            "/api/v1/summary" => Route::Summary,
            _ => Route::Page,
        }
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
        watch: &Watch,
    ) -> Response<Payload> {
        let _handling = watch.request();
        let (reply, permit) = self.reply(&request, watch).await;
        let mut reply = self.with_configured_headers(reply);
        if request.method() == Method::HEAD {
            reply = reply.without_body();
        }
        if request.version() >= Version::HTTP_2 {
            reply.headers.remove(header::CONNECTION);
        }
        log::debug!(
            "{} {} {}",
            request.method(),
            request.uri().path().escape_debug(),
            reply.status.as_u16()
        );
        let body = Payload::new(reply.body, request.version(), watch.response(permit));
        let mut response = Response::new(body);
        *response.status_mut() = reply.status;
        *response.headers_mut() = reply.headers;
        response
    }

    async fn reply(
        &self,
        request: &Request<Incoming>,
        watch: &Watch,
    ) -> (Reply, Option<OwnedSemaphorePermit>) {
        if !names_one_host(request) {
            let line = "the request has no Host header, more than one, or one that names no host";
            return (Reply::bad_request(line), None);
        }
        let path = request.uri().path();
        let route = self.route(path);
        if !matches!(route, Route::Healthy | Route::Ready)
            && let Some(web_config) = &self.web_config
        {
            match web_config.access(request.headers(), watch.client()).await {
                Access::Allowed => {}
                Access::RateLimited => return (Reply::too_many_requests(), None),
                Access::Unauthorized => return (Reply::unauthorized(), None),
                Access::Busy => {
                    let line = "too many credentials are being checked, try again later";
                    return (Reply::unavailable(line), None);
                }
            }
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return (Reply::method_not_allowed(), None);
        }
        if !request.body().is_end_stream() {
            return (Reply::body_refused(), None);
        }
        let _working = watch.work();
        let gzip = wants_gzip(request.headers());
        match route {
            Route::Healthy => (Reply::line(StatusCode::OK, "connmon is healthy"), None),
            Route::Ready => (self.readiness().await, None),
            Route::Telemetry => self.scrape(Want::Metrics { gzip }, METRICS, watch).await,
            Route::Summary => self.scrape(Want::Summary { gzip }, JSON, watch).await,
            Route::Page => (self.page(path, gzip), None),
        }
    }

    async fn readiness(&self) -> Reply {
        let known = *self.ready_at.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none_or(|at| at.elapsed() >= READY_KEPT) {
            match self.desk.ask(Want::Readiness).await {
                Answer::Ready | Answer::Body { .. } => {
                    let mut ready_at = self.ready_at.lock().unwrap_or_else(PoisonError::into_inner);
                    *ready_at = Some(Instant::now());
                }
                Answer::NotReady(what) => return waiting_for(&what),
                Answer::Unavailable(why) => return Reply::unavailable(why),
            }
        }
        Reply::line(StatusCode::OK, "connmon is ready")
    }

    /// An answer out of the report. The permit goes with the response: a
    /// scrape is in flight until its last byte is sent.
    async fn scrape(
        &self,
        want: Want,
        content_type: &'static str,
        watch: &Watch,
    ) -> (Reply, Option<OwnedSemaphorePermit>) {
        let permit = match &self.permits {
            None => None,
            Some(permits) => match self.permit(permits, watch).await {
                Some(permit) => Some(permit),
                None => {
                    let line = format!(
                        "limit of concurrent requests reached ({}, --web.max-requests), try again later",
                        self.max_requests
                    );
                    return (Reply::unavailable(line), None);
                }
            },
        };
        let reply = match self.desk.ask(want).await {
            Answer::Body { body, gzip } => {
                Reply::new(StatusCode::OK, content_type, body).negotiated(gzip)
            }
            Answer::NotReady(what) => waiting_for(&what),
            Answer::Unavailable(why) => Reply::unavailable(why),
            Answer::Ready => Reply::unavailable("no report"),
        };
        (reply, permit)
    }

    /// A place among the scrapes in flight, if need be that of a client that
    /// has been reading its answer for too long.
    async fn permit(
        &self,
        permits: &Arc<Semaphore>,
        watch: &Watch,
    ) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
            return Some(permit);
        }
        if !self.connections.cut_slow_reader(watch.client()) {
            return None;
        }
        // It lets go as soon as its task is polled.
        let permit = Arc::clone(permits).acquire_owned();
        let permit = tokio::time::timeout(Duration::from_millis(100), permit).await;
        permit.ok()?.ok()
    }

    fn page(&self, path: &str, wants_gzip: bool) -> Reply {
        let mut assets = self.assets.lock().unwrap_or_else(PoisonError::into_inner);
        if !assets.contains_key(path) {
            let content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(asset) = content.asset(path) else {
                return Reply::line(StatusCode::NOT_FOUND, "no such page");
            };
            if assets.len() >= ASSETS_KEPT {
                assets.clear();
            }
            let packed = gzip_small(&asset.body);
            assets.insert(path.to_owned(), (asset, packed));
        }
        let (asset, packed) = &assets[path];
        let small = asset.body.len() < WORTH_COMPRESSING || packed.len() >= asset.body.len();
        let gzip = wants_gzip && !small;
        let body = if gzip { packed } else { &asset.body };
        Reply::new(StatusCode::OK, asset.content_type, body.clone())
            .negotiated(gzip)
            .with(CACHE_CONTROL, "no-cache")
    }
}

fn waiting_for(what: &str) -> Reply {
    Reply::unavailable(format_args!("not ready yet: waiting for {what}"))
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
    text.is_empty()
        || text.parse::<Authority>().is_ok_and(|authority| {
            let port = text.strip_prefix(authority.host());
            port.is_some_and(|port| match port.strip_prefix(':') {
                Some(digits) => digits.bytes().all(|digit| digit.is_ascii_digit()),
                None => port.is_empty(),
            })
        })
}

#[cfg(test)]
mod tests;
