//! A stream and a response body that report to their [`Connection`].

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::Version;
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::connections::{Connection, InFlight};

/// Bytes of a body given to hyper at a time over HTTP/1. With half of it, a
/// body is sent in pieces of one segment, each of which wakes its reader.
const CHUNK: usize = 128 * 1024;
/// The same over HTTP/2, a frame. h2 reports as flushed what still waits for
/// the client's window, so larger pieces would count as sent.
const FRAME: usize = 16 * 1024;

/// A stream that reports what is read and flushed.
pub(crate) struct ReportingStream<S> {
    stream: S,
    connection: Arc<Connection>,
    /// Whether only responses of the handler are written.
    only_responses: bool,
    /// Whether something else was not written for that reason.
    withheld: bool,
}

impl<S> ReportingStream<S> {
    /// With `only_responses`, hyper's own answer to an HTTP/1 request that it
    /// cannot parse is withheld: it has none of the headers that every
    /// response here has.
    pub(crate) fn new(stream: S, connection: &Arc<Connection>, only_responses: bool) -> Self {
        Self {
            stream,
            connection: Arc::clone(connection),
            only_responses,
            withheld: false,
        }
    }

    /// The stream, if an answer was withheld and another is to be sent.
    pub(crate) fn unanswered(self) -> Option<S> {
        self.withheld.then_some(self.stream)
    }

    fn withholds(&mut self) -> bool {
        self.withheld |= self.only_responses && !self.connection.is_responding();
        self.withheld
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReportingStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.connection.bytes_read();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReportingStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.withholds() {
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.withholds() {
            return Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()));
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.connection.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.withheld {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A response body. Until it is sent completely, the request counts as in
/// flight and the write timeout runs.
#[derive(Debug)]
pub(crate) struct Payload {
    rest: Bytes,
    /// Most to be given at a time.
    chunk: usize,
    _in_flight: InFlight,
}

impl Payload {
    pub(crate) fn new(body: Bytes, version: Version, in_flight: InFlight) -> Self {
        let multiplexed = version >= Version::HTTP_2;
        Self {
            rest: body,
            chunk: if multiplexed { FRAME } else { CHUNK },
            _in_flight: in_flight,
        }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let length = self.rest.len().min(self.chunk);
        let frame = (length > 0).then(|| Ok(Frame::data(self.rest.split_to(length))));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}
