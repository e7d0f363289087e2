//! What a running process says about itself: its instances with their pathways, counts and rates, and
//! their connections. The values that `status`, `conns`, `explain`, `top` and the metrics all show.
//!
//! Owns: these values and how they are gathered from running relays. Must not know: sockets, how
//! anything is shown.

mod pathways;
mod rates;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::control::messages::{Conns, Request, Response};
use crate::model::{Instance, Pathway};
use crate::pathway::Firewall;
use crate::relay::counters::Totals;
use crate::relay::ports::Port;
use crate::relay::report::LastError;
use crate::relay::server::Server;
use crate::relay::udp::counters as udp;
use crate::relay::view::{Ask, Connection, Filter, Query};
use crate::runtime_dir::RuntimeDir;

pub use pathways::{PathwayReport, PathwayState};
pub use rates::Rates;

/// One instance as the process that runs it sees it.
#[derive(Debug, Clone)]
pub struct Subject {
    /// As configured.
    pub instance: Instance,
    /// Its pathway.
    pub pathway: Option<Pathway>,
    /// What puts that in place, where it is not.
    pub mended: Option<String>,
    /// What it is doing.
    pub standing: Standing,
    /// Its relay, where it runs, and those before it that still drain.
    pub servers: Vec<Rc<Server>>,
}

/// What an instance is doing, and how it came to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// What it is doing.
    pub state: State,
    /// For how long, in milliseconds.
    pub for_ms: u64,
    /// Why it last failed, whatever it does now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<String>,
    /// How often it has failed.
    pub failures: u64,
}

/// What an instance is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is being started.
    Starting,
    /// It accepts connections.
    Running,
    /// It failed and will be started again.
    Waiting,
    /// It takes no new connections.
    Draining,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Starting, Self::Running, Self::Waiting, Self::Draining];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Draining => "draining",
        }
    }
}

/// The answer to `status`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Process {
    /// Its process id.
    pub pid: u32,
    /// The program's version.
    pub version: String,
    /// When it started, in seconds since 1970.
    pub started: u64,
    /// How long ago that is, in milliseconds.
    pub uptime_ms: u64,
    /// Its instances, in the order of the file.
    pub instances: Vec<InstanceReport>,
}

/// One instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InstanceReport {
    /// Its name.
    pub name: String,
    /// Its pathway.
    pub pathway: PathwayReport,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Where it accepts.
    pub listen: String,
    /// Where clients go, IPv4 first.
    pub targets: Vec<String>,
    /// What it is doing.
    #[serde(flatten)]
    pub standing: Standing,
    /// Everything counted since it started; flows count as connections.
    pub totals: Totals,
    /// What came to each port of a range, of those to which anything came.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// What a UDP instance counts beyond that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datagrams: Option<udp::Totals>,
    /// The same per second, over the last few seconds.
    pub rates: Rates,
    /// What last went wrong with a connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<LastError>,
    /// The last error of each kind and proxy, the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recent_errors: Vec<LastError>,
}

/// The answer to `conns`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listing {
    /// How many there are; more than `connections` has where a limit was asked for.
    pub total: usize,
    /// In the order asked for.
    pub connections: Vec<Connection>,
}

/// The answer to `explain`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Explanation {
    /// Open ones, the newest first.
    pub open: Vec<Connection>,
    /// Those that ended not long ago, the newest first.
    pub ended: Vec<Connection>,
}

/// Gathers what is asked for. One per process, on its main thread.
#[derive(Debug)]
pub struct Overview {
    started: Instant,
    started_at: u64,
    rates: rates::Sampler,
    pathways: pathways::Watch,
}

impl Overview {
    /// How often [`Overview::sample`] is to be called.
    pub const SAMPLING: Duration = Duration::from_secs(5);

    /// Begins now; pathways are looked at with this choice of a firewall, and with what the processes of
    /// this runtime directory have repaired.
    pub fn new(firewall: Firewall, runtime_dir: RuntimeDir) -> Self {
        Self {
            started: Instant::now(),
            started_at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            rates: rates::Sampler::default(),
            pathways: pathways::Watch::new(firewall, runtime_dir),
        }
    }

    /// Takes a sample for the rates.
    pub fn sample(&self, subjects: &[Subject]) {
        let totals = subjects
            .iter()
            .map(|subject| (subject.instance.name.as_str(), subject.totals()));
        self.rates.sample(Instant::now(), totals);
    }

    /// The state of every instance.
    pub async fn process(&self, subjects: &[Subject]) -> Process {
        let wanted = subjects.iter().filter_map(|one| one.pathway.as_ref());
        let pathways = self.pathways.look(wanted).await;
        let now = Instant::now();
        let instances = subjects
            .iter()
            .map(|subject| {
                let instance = &subject.instance;
                let totals = subject.totals();
                InstanceReport {
                    name: instance.name.to_string(),
                    pathway: pathways.of(instance.mark, subject),
                    protocol: instance.options.protocol.to_string(),
                    listen: instance.listen.to_string(),
                    targets: instance.target_texts(),
                    standing: subject.standing.clone(),
                    rates: self.rates.rates(instance.name.as_str(), now, &totals),
                    totals,
                    ports: subject.ports(),
                    datagrams: subject.datagrams(),
                    last_error: subject
                        .servers
                        .iter()
                        .filter_map(|server| server.last_error())
                        .max_by_key(|error| error.at),
                    recent_errors: subject
                        .servers
                        .iter()
                        .flat_map(|server| server.recent_errors())
                        .collect(),
                }
            })
            .collect();
        Process {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: self.started_at,
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            instances,
        }
    }

    /// Answers what is about instances and connections; `None` for other requests.
    pub async fn answer(&self, request: &Request, subjects: &[Subject]) -> Option<Response> {
        Some(match request {
            Request::Status {} => Response::ok(&self.process(subjects).await),
            Request::Conns(wanted) => {
                let rows = ask(
                    Ask::Live,
                    &wanted.filter,
                    among(subjects, &wanted.instances),
                )
                .await;
                Response::ok(&listing(rows, wanted))
            }
            Request::ConnsKill { instances, filter } => {
                let rows = ask(Ask::Kill, filter, among(subjects, instances)).await;
                Response::ok(&listing(rows, &Conns::default()))
            }
            Request::Explain { filter } => {
                let mut open = ask(Ask::Live, filter, subjects).await;
                open.sort_unstable_by_key(|row| row.age_ms);
                let mut ended = ask(Ask::Recent, filter, subjects).await;
                ended.sort_by_key(|row| row.ended.as_ref().map(|ended| ended.ago_ms));
                Response::ok(&Explanation { open, ended })
            }
            _ => return None,
        })
    }
}

impl Subject {
    fn totals(&self) -> Totals {
        self.servers.iter().map(|server| server.totals()).sum()
    }

    /// Of all its relays together.
    fn ports(&self) -> Vec<Port> {
        let mut all: BTreeMap<u16, u64> = BTreeMap::new();
        for one in self.servers.iter().flat_map(|server| server.ports()) {
            *all.entry(one.port).or_default() += one.accepted;
        }
        let ports = all.into_iter();
        ports
            .map(|(port, accepted)| Port { port, accepted })
            .collect()
    }

    fn datagrams(&self) -> Option<udp::Totals> {
        let counted = self.servers.iter().filter_map(|server| server.datagrams());
        counted.reduce(|mut sum, one| {
            sum += one;
            sum
        })
    }
}

/// The subjects of these names; all of them where there are none.
fn among<'s>(
    subjects: &'s [Subject],
    names: &'s [String],
) -> impl IntoIterator<Item = &'s Subject> {
    subjects.iter().filter(move |subject| {
        names.is_empty()
            || names
                .iter()
                .any(|name| name == subject.instance.name.as_str())
    })
}

/// Asks every worker of these instances. Each answers from its own event loop, in its turn.
async fn ask<'s>(
    what: Ask,
    filter: &Filter,
    subjects: impl IntoIterator<Item = &'s Subject>,
) -> Vec<Connection> {
    let (reply, mut answers) = mpsc::unbounded_channel();
    let query = Query {
        what,
        filter: filter.clone(),
        reply,
    };
    for subject in subjects {
        // a relay that drains remembers the same past as the one that took over
        let servers = match what {
            Ask::Recent => subject.servers.get(..1).unwrap_or_default(),
            Ask::Live | Ask::Kill => &subject.servers,
        };
        for server in servers {
            server.ask(&query);
        }
    }
    drop(query);
    let mut rows = Vec::new();
    while let Some(some) = answers.recv().await {
        rows.extend(some);
    }
    rows
}

fn listing(mut rows: Vec<Connection>, wanted: &Conns) -> Listing {
    let total = rows.len();
    wanted.sort.sort(&mut rows);
    rows.truncate(wanted.limit.unwrap_or(usize::MAX));
    Listing {
        total,
        connections: rows,
    }
}

/// The order of a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Sort {
    /// The oldest first
    #[default]
    Age,
    /// The longest idle first
    Idle,
    /// The last one on which something moved first
    Moved,
    /// The most bytes, both ways together, first
    Bytes,
    /// By the client's address and port
    Client,
    /// By the proxy's address and port
    Proxy,
    /// By instance
    Instance,
}

impl Sort {
    /// Puts rows into this order.
    pub fn sort(self, rows: &mut [Connection]) {
        use std::cmp::Reverse;
        match self {
            Self::Age => rows.sort_unstable_by_key(|row| (Reverse(row.age_ms), row.id)),
            Self::Idle => rows.sort_unstable_by_key(|row| (Reverse(row.idle_ms), row.id)),
            Self::Moved => rows.sort_unstable_by_key(|row| (row.idle_ms, row.id)),
            Self::Bytes => rows.sort_unstable_by_key(|row| {
                (Reverse(row.bytes_to_target + row.bytes_to_client), row.id)
            }),
            Self::Client => rows.sort_unstable_by_key(|row| (row.client, row.id)),
            Self::Proxy => rows.sort_unstable_by_key(|row| (row.proxy, row.id)),
            Self::Instance => rows.sort_unstable_by(|a, b| {
                (&a.instance, Reverse(a.age_ms), a.id).cmp(&(&b.instance, Reverse(b.age_ms), b.id))
            }),
        }
    }
}
