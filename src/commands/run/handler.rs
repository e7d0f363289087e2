//! What a running process does about requests on its control socket.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use serde::Serialize;
use tokio::sync::mpsc;
use tracing::warn;

use super::fleet::{Fleet, ReloadError};
use super::handover::{self, Estate};
use super::process::Stop;
use super::relay::lock_name;
use super::view::View;
use crate::control::messages::{Request, Response};
use crate::runtime_dir::Lock;

/// Answers the control socket.
pub(super) struct Handler {
    pub(super) view: View,
    pub(super) fleet: Rc<Fleet>,
    /// The file of this program.
    pub(super) program: PathBuf,
    /// Of the process: of its lock and its control socket.
    pub(super) name: String,
    pub(super) lock: Option<Lock>,
    pub(super) control: std::os::unix::net::UnixListener,
    /// Tells the one that looks after everything.
    pub(super) stops: mpsc::UnboundedSender<Stop>,
}

/// What `upgrade` answers.
#[derive(Serialize)]
struct Upgraded {
    /// The process that answers, and now drains.
    from: u32,
    /// The process that took over.
    to: u32,
    /// Connections that stay with the old one until they end.
    draining: u64,
}

/// What `release` answers.
#[derive(Serialize)]
struct Released {
    /// The process that answers, and now drains.
    from: u32,
    /// Connections that stay with it until they end.
    draining: u64,
}

impl Handler {
    pub(super) async fn handle(&self, request: Request) -> Response {
        match request {
            Request::Reload {} => match self.fleet.reload().await {
                Ok(changes) => Response::ok(&changes),
                Err(ReloadError::Configuration(mistakes)) => {
                    Response::configuration(mistakes.draw(false))
                }
                // closed without an answer in a moment: the caller then asks the successor
                Err(ReloadError::Succeeded) => std::future::pending().await,
                Err(error) => Response::failed(format!("{:#}", anyhow!(error))),
            },
            Request::Upgrade {} => match self.upgrade().await {
                Ok(upgraded) => Response::ok(&upgraded),
                Err(error) => {
                    warn!("not upgraded, this process goes on: {error:#}");
                    Response::failed(format!("{error:#}"))
                }
            },
            Request::Release {} => Response::ok(&self.release().await),
            Request::Status {}
            | Request::Conns(_)
            | Request::ConnsKill { .. }
            | Request::Explain { .. } => self.view.answer(&request).await,
        }
    }

    async fn upgrade(&self) -> anyhow::Result<Upgraded> {
        let _turn = self.fleet.turn.lock().await;
        if self.fleet.succeeded.get() {
            return std::future::pending().await;
        }
        let estate = self.estate()?;
        let program = self.program.clone();
        let successor = tokio::task::spawn_blocking(move || handover::hand_over(program, estate))
            .await
            .context("the handover panicked")??;
        self.fleet.succeeded.set(true);
        self.fleet.stop_keeping();
        let upgraded = Upgraded {
            from: std::process::id(),
            to: successor.pid,
            draining: self.fleet.active(),
        };
        self.stop_soon(Stop::Successor(successor));
        Ok(upgraded)
    }

    async fn release(&self) -> Released {
        let _turn = self.fleet.turn.lock().await;
        if self.fleet.succeeded.replace(true) {
            return std::future::pending().await;
        }
        self.fleet.stop_keeping();
        self.stop_soon(Stop::Released);
        Released {
            from: std::process::id(),
            draining: self.fleet.active(),
        }
    }

    /// The answer goes out first: what follows ends the control socket.
    fn stop_soon(&self, stop: Stop) {
        let stops = self.stops.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let _ = stops.send(stop);
        });
    }

    fn estate(&self) -> anyhow::Result<Estate> {
        let mut estate = Estate {
            control: Some(self.control.try_clone()?.into()),
            ..Estate::default()
        };
        if let Some(lock) = &self.lock {
            estate.locks.insert(self.name.clone(), lock.share()?);
        }
        let supervisor = self.fleet.supervisor.borrow();
        for (name, _) in self.fleet.statuses() {
            let Some(relay) = supervisor.task(&name) else {
                continue;
            };
            estate.listeners.extend(relay.server.listeners()?);
            if let Some(lock) = relay.share_lock() {
                estate.locks.insert(lock_name(&name), lock?);
            }
        }
        Ok(estate)
    }
}
