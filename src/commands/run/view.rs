//! What a process that runs relays lets others see: the answers about instances and connections, and the
//! metrics.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use super::fleet::Fleet;
use super::relay::Relay;
use crate::control::messages::{Request, Response};
use crate::metrics::{self, Endpoint, Listener};
use crate::model::Instance;
use crate::overview::{Overview, Standing, State, Subject};
use crate::supervisor;

/// How often an address that is taken is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// The fleet as others see it.
#[derive(Debug, Clone)]
pub(super) struct View {
    fleet: Rc<Fleet>,
    overview: Rc<Overview>,
}

impl View {
    /// Begins to take samples for the rates.
    pub(super) fn new(fleet: Rc<Fleet>) -> Self {
        let view = Self {
            overview: Rc::new(Overview::new(
                fleet.world.firewall,
                fleet.world.runtime_dir.clone(),
            )),
            fleet,
        };
        let sampled = view.clone();
        tokio::task::spawn_local(async move {
            let mut tick = interval(Overview::SAMPLING);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                sampled.overview.sample(&sampled.fleet.subjects());
            }
        });
        view
    }

    /// Serves metrics from here on, until aborted.
    pub(super) async fn serve_metrics(&self, endpoint: &Endpoint) -> anyhow::Result<AbortHandle> {
        let first = match Listener::bind(endpoint).await {
            // the process that we follow has it until it gives way
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                warn!(at = %endpoint, "the address for metrics is taken: tried again until it is free");
                None
            }
            bound => Some(bound.with_context(|| format!("cannot serve metrics at {endpoint}"))?),
        };
        let (view, endpoint) = (self.clone(), endpoint.clone());
        let serving = tokio::task::spawn_local(async move {
            let listener = match first {
                Some(listener) => listener,
                None => bind_later(&endpoint).await,
            };
            match listener.local_addr() {
                Some(addr) => {
                    info!(url = %format_args!("http://{addr}/metrics"), "serving metrics");
                }
                None => info!(path = %endpoint, "serving metrics"),
            }
            metrics::serve(listener, move || {
                let view = view.clone();
                async move { view.overview.process(&view.fleet.subjects()).await }
            })
            .await
        });
        Ok(serving.abort_handle())
    }

    /// Answers what is about instances and connections.
    pub(super) async fn answer(&self, request: &Request) -> Response {
        let subjects = self.fleet.subjects();
        match self.overview.answer(request, &subjects).await {
            Some(response) => response,
            None => Response::failed("this process has no answer to that"),
        }
    }
}

async fn bind_later(endpoint: &Endpoint) -> Listener {
    loop {
        tokio::time::sleep(AGAIN).await;
        if let Ok(listener) = Listener::bind(endpoint).await {
            return listener;
        }
    }
}

impl Fleet {
    /// What puts an instance's pathway in place.
    fn mended(&self, instance: &Instance) -> Option<String> {
        instance.mark.map(|mark| self.world.maker.mends(mark))
    }

    /// Every instance with its relays, those that drain and have no other too.
    fn subjects(&self) -> Vec<Subject> {
        let configuration = Rc::clone(&self.world.configuration.borrow());
        let supervisor = self.supervisor.borrow();
        let specs = self.specs.borrow();
        let mut draining: BTreeMap<String, Vec<(Instant, Rc<Relay>)>> = BTreeMap::new();
        for (since, relay) in supervisor.drained_tasks() {
            let of = draining.entry(relay.instance.name.to_string()).or_default();
            of.push((since, relay));
        }
        let mut subjects = Vec::with_capacity(specs.len());
        for (name, status) in self.statuses() {
            let Some(spec) = specs.get(&name) else {
                continue;
            };
            let running = supervisor.task(&name);
            let older = draining.remove(&name).unwrap_or_default();
            let relays = running.iter().chain(older.iter().map(|(_, relay)| relay));
            subjects.push(Subject {
                instance: spec.instance.clone(),
                pathway: self.pathway_of(&spec.instance),
                mended: self.mended(&spec.instance),
                standing: standing(&status),
                servers: relays.map(|relay| Rc::clone(&relay.server)).collect(),
            });
        }
        let mut ending: Vec<Subject> = draining
            .into_values()
            .filter_map(|relays| {
                let (since, first) = relays.first()?;
                let instance = first.instance.clone();
                Some(Subject {
                    pathway: self.pathway_of(&instance),
                    mended: self.mended(&instance),
                    instance,
                    standing: Standing {
                        state: State::Draining,
                        for_ms: milliseconds(since.elapsed()),
                        last_failure: None,
                        failures: 0,
                    },
                    servers: relays
                        .iter()
                        .map(|(_, relay)| Rc::clone(&relay.server))
                        .collect(),
                })
            })
            .collect();
        // in the order of the file, which is the one that people know
        let all = configuration.instances.iter().enumerate();
        let places: HashMap<_, _> = all.map(|(place, one)| (&one.name, place)).collect();
        for some in [&mut subjects, &mut ending] {
            some.sort_by_key(|subject| places.get(&subject.instance.name));
        }
        subjects.append(&mut ending);
        subjects
    }
}

fn standing(status: &supervisor::Status) -> Standing {
    Standing {
        state: match status.state {
            supervisor::State::Starting => State::Starting,
            supervisor::State::Running => State::Running,
            supervisor::State::Waiting { .. } => State::Waiting,
        },
        for_ms: milliseconds(status.since.elapsed()),
        last_failure: status.last_failure.clone(),
        failures: status.failures,
    }
}

fn milliseconds(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
