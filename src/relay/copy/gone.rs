//! A side that has sent its end and goes before it has heard the other's.
//!
//! Nothing is read from it any more, so that its reset is announced to nobody: it is looked at now and then.
//! What is written to it finds out by itself.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

/// How often. Most that have sent their end get the other's long before.
const EVERY: Duration = Duration::from_secs(5);

pub(super) struct Gone(Pin<Box<Sleep>>);

impl Gone {
    pub(super) fn new() -> Self {
        Self(Box::pin(tokio::time::sleep(EVERY)))
    }

    /// Ready when it has gone, with what the kernel says.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, side: &TcpStream) -> Poll<io::Error> {
        loop {
            ready!(self.0.as_mut().poll(cx));
            match side.take_error() {
                Ok(Some(error)) | Err(error) => return Poll::Ready(error),
                Ok(None) => self.0.as_mut().reset(Instant::now() + EVERY),
            }
        }
    }
}
