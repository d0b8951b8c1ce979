//! The HTTP server: accepts connections, speaks TLS, HTTP/1 and HTTP/2 with
//! them, and passes their requests to [`App`]. Everything runs on one thread,
//! the caller's; what takes a client's time is bounded by [`Limits`].

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use connmon_core::report::Reporter;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::address::ListenAddress;
use crate::app::App;
use crate::connections::{Connection, Connections, Slot};
use crate::limits::Limits;
use crate::listen;
use crate::render_queue::RenderQueue;
use crate::response::Reply;
use crate::stream::ReportingStream;
use crate::webconfig::WebConfig;
use crate::{ConfigError, Content};

/// Clients that are being answered that the server is full; more are just
/// disconnected.
const REFUSALS: usize = 16;

/// How long a client has to read the last answer on its connection.
const CLOSING_TIME: Duration = Duration::from_millis(500);

/// Bytes that are still read from it meanwhile, at most.
const CLOSING_BYTES: u64 = 256 * 1024;

/// Connections beside those of the scrapes that `--web.max-requests` allows:
/// for health, the page and clients that send nothing.
const BESIDE_SCRAPES: usize = 24;

/// Streams of one HTTP/2 connection at once.
const STREAMS: u32 = 16;

/// First and longest pause between attempts to accept while the host has no
/// file descriptor or memory left.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];

/// What a server is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// `--web.listen-address`, at least one.
    pub listen: Vec<ListenAddress>,
    /// `--web.telemetry-path`.
    pub telemetry_path: String,
    /// `--web.config.file`.
    pub web_config_file: Option<PathBuf>,
    /// `--web.max-requests`; 0 is unlimited.
    pub max_requests: usize,
}

/// Why there is no server.
#[derive(Debug)]
pub enum ServeError {
    /// The web configuration or a file that it names.
    WebConfig(ConfigError),
    /// A listen address that cannot be looked up or bound.
    Listen(ConfigError),
}

impl std::fmt::Display for ServeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::WebConfig(error) | Self::Listen(error)) = self;
        error.fmt(f)
    }
}

impl std::error::Error for ServeError {}

/// A bound, not yet serving server.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<TcpListener>,
    telemetry_path: String,
    max_requests: usize,
    limits: Limits,
    web_config: Option<Arc<WebConfig>>,
}

impl Server {
    /// Reads `--web.config.file` with what it names and binds every
    /// `--web.listen-address`. Needs no runtime, and is to be called before
    /// privileges are dropped.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn bind(options: &Options) -> Result<Self, ServeError> {
        let web_config = options.web_config_file.as_deref().map(WebConfig::open);
        Ok(Self {
            web_config: web_config.transpose().map_err(ServeError::WebConfig)?,
            listeners: listen::bind_all(&options.listen).map_err(ServeError::Listen)?,
            telemetry_path: options.telemetry_path.clone(),
            max_requests: options.max_requests,
            limits: Limits::default(),
        })
    }

    /// Other limits than the documented ones (tests).
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// What is listened on, with the ports the kernel chose for port 0.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let addresses = self.listeners.iter().map(TcpListener::local_addr);
        addresses.filter_map(Result::ok).collect()
    }

    /// The files that are reloaded when they change: the web
    /// configuration, certificate, key and client CAs. They have to stay
    /// readable.
    pub fn files(&self) -> Vec<PathBuf> {
        let web_config = self.web_config.as_ref();
        web_config.map(|it| it.files()).unwrap_or_default()
    }

    /// A URL that leads to the page from this host, for the log.
    pub fn url(&self) -> Option<String> {
        let address = *self.addresses().first()?;
        let host = match address.ip() {
            ip if ip.is_unspecified() => "localhost".to_owned(),
            std::net::IpAddr::V6(ip) => format!("[{ip}]"),
            ip => ip.to_string(),
        };
        let tls = self.web_config.as_ref().is_some_and(|it| it.is_tls());
        let scheme = if tls { "https" } else { "http" };
        Some(format!("{scheme}://{host}:{}/", address.port()))
    }

    /// Serves until `shutdown` resolves, then lets requests in flight end
    /// ([`Limits::drain`]). To be polled inside a tokio runtime.
    ///
    /// # Panics
    ///
    /// When a rendering or a connection panicked: the panic is passed on, so
    /// that the process ends instead of serving half of itself.
    pub async fn serve(
        self,
        reporter: Arc<dyn Reporter>,
        content: impl Content,
        shutdown: impl Future<Output = ()>,
    ) -> std::io::Result<()> {
        let least = self.max_requests.saturating_add(BESIDE_SCRAPES);
        let limits = Arc::new(Limits {
            connections: self.limits.connections.max(least),
            ..self.limits
        });
        let connections = Connections::new(Arc::clone(&limits));
        let content = Arc::new(Mutex::new(content));
        let (queue, renderer) = RenderQueue::new(reporter, Arc::clone(&content), limits.report);
        let permits = self.max_requests.min(Semaphore::MAX_PERMITS);
        let app = Arc::new(App {
            telemetry_path: self.telemetry_path,
            permits: (permits > 0).then(|| Arc::new(Semaphore::new(permits))),
            max_requests: self.max_requests,
            queue,
            content,
            web_config: self.web_config,
            connections: Arc::clone(&connections),
            assets: Mutex::default(),
            ready_at: Mutex::default(),
        });
        let (stop, stopping) = watch::channel(false);
        let (accepted, mut newcomers) = mpsc::channel(1);
        let mut background = JoinSet::new();
        background.spawn(renderer);
        for listener in self.listeners {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            background.spawn(accept(listener, accepted.clone(), Arc::clone(&connections)));
        }
        let mut serving = JoinSet::new();
        let refusals = Arc::new(Semaphore::new(REFUSALS));
        let mut tick = tokio::time::interval(limits.tick);
        let mut shutdown = pin!(shutdown);
        loop {
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(ended) = background.join_next() => pass_panic_on(ended),
                Some(ended) = serving.join_next() => pass_panic_on(ended),
                _ = tick.tick() => {
                    connections.close_overdue();
                    if let Some(web_config) = &app.web_config {
                        // So that a broken file is logged at once.
                        tokio::spawn(Arc::clone(web_config).refresh());
                    }
                }
                Some((stream, peer)) = newcomers.recv() => {
                    let app = Arc::clone(&app);
                    if let Some(slot) = connections.admit(peer.ip()).await {
                        let limits = Arc::clone(&limits);
                        serving.spawn(serve_client(stream, slot, app, limits, stopping.clone()));
                    } else if !app.is_tls()
                        && let Ok(permit) = Arc::clone(&refusals).try_acquire_owned()
                    {
                        let line = "every connection is busy with other scrapes; retry soon";
                        serving.spawn(async move {
                            answer_and_close(stream, &app, Reply::unavailable(line)).await;
                            drop(permit);
                        });
                    }
                }
            }
        }
        stop.send_replace(true);
        drop(newcomers);
        let drained = tokio::time::timeout(limits.drain, async {
            while let Some(ended) = serving.join_next().await {
                pass_panic_on(ended);
            }
        });
        if drained.await.is_err() {
            log::debug!("requests in flight did not end in time and were cut off");
        }
        Ok(())
    }
}

fn pass_panic_on(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && let Ok(panic) = error.try_into_panic()
    {
        std::panic::resume_unwind(panic);
    }
}

/// Accepts for ever. When the host has no file descriptor or memory left, it
/// closes a connection for its descriptor and waits; an error of one
/// connection (reset before it was accepted) does not matter to the others.
async fn accept(
    listener: tokio::net::TcpListener,
    accepted: mpsc::Sender<(TcpStream, SocketAddr)>,
    connections: Arc<Connections>,
) {
    let mut pause = PAUSES[0];
    loop {
        match listener.accept().await {
            Ok(newcomer) => {
                pause = PAUSES[0];
                if accepted.send(newcomer).await.is_err() {
                    return;
                }
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                    log::warn!("cannot accept HTTP connections: {error}; closing one and retrying");
                    connections.close_one();
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES[1]);
                }
                // A pause, lest an error that stays become a busy loop.
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            },
        }
    }
}

/// Sends the last answer of a connection over HTTP/1 and waits for the client
/// to close: closing with its request unread would reset the connection, and
/// the answer could be lost.
async fn answer_and_close(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    app: &App,
    reply: Reply,
) {
    let reply = app.with_configured_headers(reply);
    let answer = async {
        stream.write_all(&reply.into_closing_bytes()).await?;
        stream.shutdown().await?;
        let mut unread = stream.take(CLOSING_BYTES);
        tokio::io::copy(&mut unread, &mut tokio::io::sink()).await
    };
    // The connection ends whether the client has read it or not.
    let _ = tokio::time::timeout(CLOSING_TIME, answer).await;
}

async fn serve_client(
    stream: TcpStream,
    slot: Slot,
    app: Arc<App>,
    limits: Arc<Limits>,
    stopping: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    let connection = &slot.connection;
    let serve = async {
        let tls = match &app.web_config {
            Some(web_config) => web_config.tls().await,
            None => None,
        };
        let Some(tls) = tls else {
            connection.handshaken(false);
            return serve_http1(stream, connection, &app, &limits, stopping).await;
        };
        match shake_hands(stream, tls, &app, connection).await {
            Ok(stream) if stream.get_ref().1.alpn_protocol() == Some(b"h2") => {
                connection.handshaken(true);
                serve_http2(stream, connection, &app, &limits, stopping).await;
            }
            Ok(stream) => {
                connection.handshaken(false);
                serve_http1(stream, connection, &app, &limits, stopping).await;
            }
            Err(error) => log::debug!("TLS handshake failed: {error}"),
        }
    };
    tokio::select! {
        () = serve => {}
        () = connection.close.notified() => {}
    }
}

/// The TLS handshake. A client that speaks plain HTTP gets the answer that
/// Go's server gives.
async fn shake_hands(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    app: &App,
    connection: &Arc<Connection>,
) -> std::io::Result<TlsStream<ReportingStream<TcpStream>>> {
    let mut first = [0];
    stream.peek(&mut first).await?;
    if first[0].is_ascii_uppercase() {
        let line = "Client sent an HTTP request to an HTTPS server.";
        answer_and_close(stream, app, Reply::bad_request(line)).await;
        return Err(std::io::Error::other("the client spoke plain HTTP"));
    }
    let stream = ReportingStream::new(stream, connection, false);
    TlsAcceptor::from(config).accept(stream).await
}

async fn serve_http1<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    connection: &Arc<Connection>,
    app: &App,
    limits: &Limits,
    stopping: watch::Receiver<bool>,
) {
    let stream = ReportingStream::new(stream, connection, true);
    let service = service_fn(|request| app.handle(request, connection));
    let mut builder = http1::Builder::new();
    // hyper's own timeout would give an idle connection as long as a header;
    // the connection's deadlines are separate.
    builder
        .header_read_timeout(None)
        // A client that has shut down its sending side still reads.
        .half_close(true)
        .max_headers(limits.header_fields)
        .max_header_size(limits.header_bytes)
        .max_buf_size(limits.header_bytes.max(64 * 1024));
    let mut served = builder.serve_connection(TokioIo::new(stream), service);
    let graceful = http1::Connection::graceful_shutdown;
    let result = until_stopped(Pin::new(&mut served), graceful, stopping).await;
    let stream = served.into_parts().io.into_inner().unanswered();
    if let (Err(error), Some(stream)) = (result, stream) {
        let reply = if error.is_parse_too_large() {
            Reply::header_too_large(limits)
        } else {
            Reply::bad_request("the request is not valid HTTP/1.1")
        };
        answer_and_close(stream, app, reply).await;
    }
}

async fn serve_http2<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    connection: &Arc<Connection>,
    app: &Arc<App>,
    limits: &Limits,
    stopping: watch::Receiver<bool>,
) {
    let stream = ReportingStream::new(stream, connection, false);
    let service = service_fn(|request| {
        let (app, connection) = (Arc::clone(app), Arc::clone(connection));
        async move { app.handle(request, &connection).await }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .max_send_buf_size(64 * 1024);
    let served = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let graceful = http2::Connection::graceful_shutdown;
    // An error is logged there, and can be answered only over HTTP/1.
    let _ = until_stopped(served, graceful, stopping).await;
}

/// Serves until the client closes, or until requests in flight have ended
/// after the server was asked to stop.
async fn until_stopped<C: Future<Output = hyper::Result<()>>>(
    mut served: Pin<&mut C>,
    graceful_shutdown: impl FnOnce(Pin<&mut C>),
    mut stopping: watch::Receiver<bool>,
) -> hyper::Result<()> {
    let result = tokio::select! {
        result = served.as_mut() => Some(result),
        _ = stopping.wait_for(|stop| *stop) => None,
    };
    let result = match result {
        Some(result) => result,
        None => {
            graceful_shutdown(served.as_mut());
            served.await
        }
    };
    if let Err(error) = &result {
        log::debug!("HTTP connection ended: {error}");
    }
    result
}
