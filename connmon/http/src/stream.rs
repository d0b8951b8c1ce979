//! A stream and a response body that report to the connection's watch.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::Version;
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::connections::{Responding, Watch};

/// Bytes of a body given to hyper at a time over HTTP/1. With half of it, a
/// body goes out in pieces of one segment, each of which wakes its reader.
const CHUNK: usize = 128 * 1024;
/// The same over HTTP/2, a frame: what waits there for the reader's window is
/// flushed as far as can be seen here.
const FRAME: usize = 16 * 1024;

/// A stream that reports what is read and flushed.
pub(crate) struct Watched<S> {
    stream: S,
    watch: Watch,
    /// Whether only responses of the handler are written.
    only_responses: bool,
    /// Whether something else was not written for that reason.
    withheld: bool,
}

impl<S> Watched<S> {
    pub(crate) fn new(stream: S, watch: Watch) -> Self {
        Self {
            stream,
            watch,
            only_responses: false,
            withheld: false,
        }
    }

    /// Writes only responses of the handler. All that hyper writes beside them
    /// over HTTP/1 is its answer to a request that it cannot parse, which has
    /// none of the headers that every response here has.
    pub(crate) fn only_responses(stream: S, watch: Watch) -> Self {
        Self {
            only_responses: true,
            ..Self::new(stream, watch)
        }
    }

    /// The stream, if an answer was withheld and another is to be sent.
    pub(crate) fn unanswered(self) -> Option<S> {
        self.withheld.then_some(self.stream)
    }

    fn withholds(&mut self) -> bool {
        self.withheld |= self.only_responses && !self.watch.is_responding();
        self.withheld
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.watch.bytes_read();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
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
        self.watch.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.withheld {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A response body. As long as it is not sent completely, the request counts
/// as in flight and the write timeout runs.
#[derive(Debug)]
pub(crate) struct Payload {
    rest: Bytes,
    /// Most to be given at a time.
    chunk: usize,
    _responding: Responding,
}

impl Payload {
    pub(crate) fn new(body: Bytes, version: Version, responding: Responding) -> Self {
        Self {
            rest: body,
            chunk: if version >= Version::HTTP_2 {
                FRAME
            } else {
                CHUNK
            },
            _responding: responding,
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
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let length = self.rest.len().min(self.chunk);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}
