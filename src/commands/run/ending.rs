//! The end of a process: told by a signal, succeeded by another, or released for another to come.
//!
//! Whichever it is, it takes no new connections, and shows itself on a control socket of its own while the
//! open ones go on.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sd_notify::NotifyState;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{debug, info, warn};

use super::fleet::Fleet;
use super::handler::Handler;
use super::handover::Successor;
use super::process::{Process, Stop};
use super::signals::Signals;
use super::view::View;
use crate::control::client::{self, SUFFIX};
use crate::control::messages::{Request, Response};
use crate::control::server;
use crate::relay::counters::Totals;
use crate::relay::udp::counters as udp;
use crate::systemd;

/// What is needed to end well.
pub(super) struct Ending<'p> {
    pub(super) process: &'p Process,
    pub(super) view: View,
    pub(super) signals: &'p mut Signals,
    /// The control socket's answers.
    pub(super) answering: JoinHandle<std::io::Result<std::convert::Infallible>>,
    pub(super) handler: Rc<Handler>,
}

impl Ending<'_> {
    /// Ends, in one of the three ways.
    pub(super) async fn take(self, stop: Stop) {
        let Self {
            process,
            view,
            signals,
            answering,
            handler,
        } = self;
        // whoever asks from here on asks the successor, or is told that nobody runs
        let close = async || {
            drop(handler);
            answering.abort();
            let _ = answering.await;
        };
        match stop {
            Stop::Signal(signal) => {
                close().await;
                process.remove_control_socket();
                process.fleet.remove_socket_files();
                systemd::notify(&[NotifyState::Stopping]);
                let shown = Shown::begin(process, view);
                let older = process.end_older().await;
                process.stop(signals, signal).await;
                process.wait_for_older(older).await;
                drop(shown);
                process.fleet.remove_pathways().await;
            }
            Stop::Successor(successor) => {
                close().await;
                let _shown = Shown::begin(process, view);
                process.give_way(signals, successor).await;
                process.fleet.remove_left().await;
            }
            Stop::Released => {
                process.remove_control_socket();
                systemd::notify(&[NotifyState::Stopping]);
                process.fleet.supervisor.borrow_mut().drain_all();
                let _shown = Shown::begin(process, view);
                process.keeper.let_go().await;
                // last: this is what whoever asked waits for
                close().await;
                info!(
                    active = process.active(),
                    "released: the open connections stay here until they end"
                );
                process.outlive(signals).await;
                process.fleet.remove_left().await;
            }
        }
    }
}

/// The control socket of a process that drains; gone with the value.
struct Shown {
    path: PathBuf,
    answering: AbortHandle,
}

impl Shown {
    /// Without a socket nobody sees it, which is no reason to cut connections.
    fn begin(process: &Process, view: View) -> Option<Self> {
        let runtime = &process.fleet.world.runtime_dir;
        client::remove_left(runtime);
        let name = client::draining(&process.name, std::process::id());
        let bound = runtime.file(&name, SUFFIX).map_err(std::io::Error::other);
        let bound = bound.and_then(|path| Ok((server::bind(&path)?, path)));
        let (listener, path) = match bound {
            Ok(bound) => bound,
            Err(error) => {
                warn!(%error, "cannot make the control socket of a process that drains: status will not show it");
                return None;
            }
        };
        let serving = server::serve(listener, move |request| {
            let view = view.clone();
            async move {
                match request {
                    Request::Reload {} | Request::Upgrade {} | Request::Release {} => {
                        Response::failed("this process drains: it has no instances any more")
                    }
                    _ => view.answer(&request).await,
                }
            }
        });
        Some(Self {
            path,
            answering: tokio::task::spawn_local(serving).abort_handle(),
        })
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.answering.abort();
        // it may be gone with the directory
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Process {
    fn active(&self) -> u64 {
        self.fleet.supervisor.borrow().draining()
    }

    /// No new connections; the open ones have until the drain timeout, or until the next signal.
    async fn stop(&self, signals: &mut Signals, signal: &str) {
        let drain_timeout = self.args.drain_timeout;
        let totals = self.totals();
        self.fleet.supervisor.borrow_mut().drain_all();
        info!(
            signal,
            active = self.active(),
            ?drain_timeout,
            "stopping: no new connections"
        );
        self.drain(signals, drain_timeout).await;
        let (totals, datagrams) = totals;
        info!(
            connections = totals.accepted,
            refused = totals.refused.all(),
            connect_failed = totals.connect_failed.all(),
            bytes.r#in = totals.bytes_to_target,
            bytes.out = totals.bytes_to_client,
            "stopped"
        );
        if let Some(udp) = datagrams {
            info!(
                flows = udp.flows_opened,
                datagrams.r#in = udp.datagrams_to_target,
                datagrams.out = udp.datagrams_to_client,
                dropped = udp.dropped.all(),
                overflow.r#in = udp.overflow_from_proxy,
                overflow.out = udp.overflow_from_target,
                unanswered = udp.flows_unanswered,
                "datagrams"
            );
        }
    }

    async fn drain(&self, signals: &mut Signals, limit: Duration) {
        tokio::select! {
            () = drained(&self.fleet) => {}
            () = tokio::time::sleep(limit) => {
                warn!(active = self.active(), "the drain timeout is over: the rest is cut");
            }
            signal = signals.stop() => {
                warn!(signal, active = self.active(), "a second signal: the rest is cut");
            }
        }
    }

    /// The successor has the sockets; the open connections stay here for as long as they like.
    async fn give_way(&self, signals: &mut Signals, successor: Successor) {
        let pid = successor.pid;
        systemd::notify(&[NotifyState::MainPid(successor.main)]);
        // the successor waits for this before it speaks to systemd itself
        drop(successor);
        self.fleet.supervisor.borrow_mut().drain_all();
        self.keeper.let_go().await;
        info!(
            successor = pid,
            active = self.active(),
            "handed over: the open connections stay here until they end"
        );
        self.outlive(signals).await;
    }

    /// Until the last connection ends; or, told to stop, until the drain timeout.
    async fn outlive(&self, signals: &mut Signals) {
        tokio::select! {
            () = drained(&self.fleet) => {}
            signal = signals.stop() => {
                info!(signal, active = self.active(), "stopping");
                self.drain(signals, self.args.drain_timeout).await;
            }
        }
    }

    /// Has those that drain under this process's name stop, too: nobody else would tell them. The
    /// connections end with them.
    async fn end_older(&self) -> Vec<UnixStream> {
        let found = client::draining_of(&self.fleet.world.runtime_dir, &self.name);
        let mut older = Vec::new();
        for path in found.unwrap_or_default() {
            let Ok(stream) = UnixStream::connect(&path).await else {
                continue;
            };
            // of the one that listens, whatever the file's name says
            let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
            let Some(pid) = pid.filter(|pid| u32::try_from(*pid) != Ok(std::process::id())) else {
                continue;
            };
            match kill(Pid::from_raw(pid), Signal::SIGTERM) {
                Ok(()) => older.push(stream),
                Err(error) => debug!(pid, %error, "cannot stop a process that drains"),
            }
        }
        older
    }

    async fn wait_for_older(&self, older: Vec<UnixStream>) {
        let ended = async {
            for mut stream in older {
                let _ = stream.read(&mut [0]).await;
            }
        };
        // they keep to the same limit by themselves
        let _ = timeout(self.args.drain_timeout + Duration::from_secs(1), ended).await;
    }

    /// Of the relays that run now; and what UDP counts beyond that, where there is UDP.
    fn totals(&self) -> (Totals, Option<udp::Totals>) {
        let supervisor = self.fleet.supervisor.borrow();
        let statuses = self.fleet.statuses();
        let servers = || {
            let running = statuses
                .iter()
                .filter_map(|(name, _)| supervisor.task(name));
            running.map(|relay| Rc::clone(&relay.server))
        };
        let datagrams = servers().filter_map(|server| server.datagrams());
        (
            servers().map(|server| server.totals()).sum(),
            datagrams.reduce(|mut sum, one| {
                sum += one;
                sum
            }),
        )
    }
}

/// Waits for the work at hand; looked at again and again, as the supervisor must not be borrowed over a wait.
async fn drained(fleet: &Fleet) {
    let mut look = interval(Duration::from_millis(20));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !fleet.supervisor.borrow_mut().is_drained() {
        look.tick().await;
    }
}
