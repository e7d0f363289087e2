//! The signals that a process acts on, by name.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signal that stands for a reload.
pub(super) const HANGUP: &str = "SIGHUP";

pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    pub(super) fn new() -> anyhow::Result<Self> {
        let install = |kind| signal(kind).context("cannot handle signals");
        Ok(Self {
            terminate: install(SignalKind::terminate())?,
            interrupt: install(SignalKind::interrupt())?,
            hangup: install(SignalKind::hangup())?,
        })
    }

    /// The next one's name. Cancel-safe.
    pub(super) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => HANGUP,
        }
    }

    /// The next one that ends the process. Cancel-safe.
    pub(super) async fn stop(&mut self) -> &'static str {
        loop {
            let name = self.next().await;
            if name != HANGUP {
                return name;
            }
        }
    }
}
