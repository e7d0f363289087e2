//! The one place that brings a plan to the kernel: lock, read, diff, apply, read back, verify, and undo
//! when any of it fails.
//!
//! Must not know: configuration, the relay, how a report is shown.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::model::{ConnmarkMode, Family, Pathway};
use crate::runtime_dir::{self, Attempt, Lock, RuntimeDir};

use super::firewall::switch::{self, Switch};
use super::firewall::table::Table;
use super::firewall::{self, Backend, Firewall, Firewalls, same_transaction};
use super::in_use::{self, ByMark};
use super::netlink::{self, Lookup, Netlink, RoutesOf};
use super::piece::{FoundRoute, Made, Step};
use super::plan::{self, Change, Conflict, Facts, Goal, Plan, Present, wants_lines};

/// Up to this many tables are read one by one; beyond, one dump of everything is cheaper.
const TABLES_ONE_BY_ONE: usize = 32;

/// Addresses of nobody (RFC 5737, RFC 3849), to ask for the route to "anywhere". No packet is sent.
const ANYWHERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1)),
];

/// The name of the lock that keeps two runs apart, and how often one that is held is tried again.
const LOCK: &str = "pathways";
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// `CAP_NET_ADMIN`, see `capabilities(7)`.
const CAP_NET_ADMIN: u32 = 12;

/// Why pathways could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No `CAP_NET_ADMIN`, or not in the user namespace that owns the network namespace.
    #[error("reading and changing pathways needs root or CAP_NET_ADMIN")]
    Denied,
    /// Another run holds the lock, or the lock cannot be made.
    #[error("cannot lock the pathways")]
    Lock(#[from] runtime_dir::Error),
    /// Rules or routes.
    #[error(transparent)]
    Netlink(netlink::Error),
    /// The mangle table.
    #[error(transparent)]
    Firewall(firewall::Error),
    /// The kernel's notifications.
    #[error("cannot listen to the kernel's changes")]
    Events(#[source] io::Error),
    /// A file under /proc.
    #[error("cannot read {path}")]
    Proc {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something forbids it.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// The switch of a host without a firewall.
    #[error(transparent)]
    Switch(#[from] switch::Error),
    /// All was done, and then was not there.
    #[error("not in place after all was done: {0}")]
    NotVerified(String),
    /// It failed half-way, and what the run had changed was taken back.
    #[error("failed, and took back what it had changed until then ({changes} changes)")]
    Undone {
        /// How many.
        changes: usize,
        /// What failed.
        #[source]
        source: Box<Error>,
    },
    /// It failed half-way, and so did taking back.
    #[error(
        "failed, and could not take back all that it had changed until then; these stand: {stands}"
    )]
    Stands {
        /// The commands whose effect stands.
        stands: String,
        /// What failed first.
        #[source]
        source: Box<Error>,
    },
}

impl Error {
    /// Whether it failed because an interface is down: a local route needs `lo` to be up.
    pub fn is_network_down(&self) -> bool {
        match self {
            Self::Netlink(error) => error.errno() == Some(libc::ENETDOWN),
            Self::Undone { source, .. } => source.is_network_down(),
            _ => false,
        }
    }
}

impl From<netlink::Error> for Error {
    fn from(error: netlink::Error) -> Self {
        match error.errno() {
            Some(libc::EPERM) => Self::Denied,
            _ => Self::Netlink(error),
        }
    }
}

impl From<firewall::Error> for Error {
    fn from(error: firewall::Error) -> Self {
        match error {
            firewall::Error::Tables { source, .. }
                if source.raw_os_error() == Some(libc::EPERM) =>
            {
                Self::Denied
            }
            error => Self::Firewall(error),
        }
    }
}

/// How a change is done.
#[derive(Debug, Clone)]
pub struct Options {
    /// Say what would change, change nothing.
    pub dry_run: bool,
    /// Where the lock is.
    pub runtime_dir: RuntimeDir,
    /// How long another run may hold it.
    pub lock_timeout: Duration,
    /// What gives replies their mark.
    pub firewall: Firewall,
    /// Whether a sysctl may be set where that needs one.
    pub set_sysctls: bool,
}

/// What a run changed, or would.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// The changes, in the order in which they were made.
    pub changes: Vec<Change>,
    /// What a person should know about the host.
    pub notes: Vec<String>,
}

/// What is there and what it means for these pathways.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) facts: Facts,
    pub(super) present: Present,
    pub(super) notes: Vec<String>,
}

/// Brings pathways to the goal.
pub(super) async fn change(
    goal: Goal,
    pathways: &[Pathway],
    options: &Options,
) -> Result<Report, Error> {
    let host = Host::open(goal, Means::of(options))?;
    let _lock = match options.dry_run {
        true => None,
        false => Some(lock(options).await?),
    };
    let reading = host.read(pathways).await?;
    let plan = plan::plan(goal, pathways, &reading.facts, &reading.present);
    let mut notes = reading.notes;
    notes.extend(plan.notes);
    if let Some(conflict) = plan.conflicts.into_iter().next() {
        return Err(conflict.into());
    }
    let changes = plan.changes;
    if !options.dry_run && !changes.is_empty() {
        let mut done = Vec::new();
        let outcome = match host.apply(&changes, &mut done).await {
            Ok(()) => host.verify(goal, pathways, &reading.facts).await,
            failed => failed,
        };
        if let Err(error) = outcome {
            return Err(host.undo(done, error).await);
        }
    }
    Ok(Report { changes, notes })
}

/// The lock that keeps two runs apart. Waits without keeping the thread from other work: that may be
/// what has the lock.
pub(super) async fn lock(options: &Options) -> Result<Lock, Error> {
    let start = Instant::now();
    let limit = options.lock_timeout;
    loop {
        match options.runtime_dir.try_lock(LOCK)? {
            Attempt::Held(lock) => return Ok(lock),
            Attempt::HeldBy(holder) if start.elapsed() >= limit => {
                let path = options.runtime_dir.file(LOCK, "lock")?;
                return Err(Error::Lock(runtime_dir::Error::Busy {
                    path,
                    holder,
                    limit,
                }));
            }
            Attempt::HeldBy(_) => tokio::time::sleep(LOCK_PAUSE).await,
        }
    }
}

/// Reads what is there, without a lock.
pub(super) async fn read(pathways: &[Pathway], firewall: Firewall) -> Result<Reading, Error> {
    let means = Means {
        firewall,
        // only asks: what is missing is the setting, not the permission
        set_sysctls: true,
        runtime_dir: None,
    };
    Host::open(Goal::Add, means)?.read(pathways).await
}

/// Every route of ours, in whatever table.
pub(super) async fn our_routes() -> Result<Vec<FoundRoute>, Error> {
    let netlink = Netlink::open()?;
    let mut routes = Vec::new();
    for family in kernel_families() {
        let of = RoutesOf::Owner(super::PROTOCOL);
        routes.extend(netlink.routes(family, of).await?);
    }
    Ok(routes)
}

/// The families that the kernel has at all.
fn kernel_families() -> Vec<Family> {
    let mut families = vec![Family::V4];
    if Path::new("/proc/sys/net/ipv6").exists() {
        families.push(Family::V6);
    }
    families
}

/// A sysctl that is a switch; one that is not there is off.
fn switch(path: &str) -> Result<bool, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim() != "0"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Proc {
            path: path.to_owned(),
            source,
        }),
    }
}

fn require_net_admin() -> Result<(), Error> {
    let path = "/proc/thread-self/status";
    let status = fs::read_to_string(path).map_err(|source| Error::Proc {
        path: path.to_owned(),
        source,
    })?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .unwrap_or(0);
    if effective & (1 << CAP_NET_ADMIN) == 0 {
        return Err(Error::Denied);
    }
    Ok(())
}

/// What may be used to give replies their mark.
#[derive(Debug)]
pub(super) struct Means {
    firewall: Firewall,
    set_sysctls: bool,
    /// Where it is recorded what was set.
    runtime_dir: Option<RuntimeDir>,
}

impl Means {
    /// Whatever is installed; no sysctl is touched.
    pub(super) fn installed() -> Self {
        Self {
            firewall: Firewall::default(),
            set_sysctls: false,
            runtime_dir: None,
        }
    }

    pub(super) fn of(options: &Options) -> Self {
        Self {
            firewall: options.firewall,
            set_sysctls: options.set_sysctls,
            runtime_dir: Some(options.runtime_dir.clone()),
        }
    }
}

/// The ways into the kernel.
#[derive(Debug)]
pub(super) struct Host {
    goal: Goal,
    means: Means,
    netlink: Netlink,
    /// The families the kernel has.
    families: Vec<Family>,
    firewalls: Firewalls,
}

impl Host {
    pub(super) fn open(goal: Goal, means: Means) -> Result<Self, Error> {
        require_net_admin()?;
        let families = kernel_families();
        Ok(Self {
            goal,
            netlink: Netlink::open()?,
            firewalls: Firewalls::open(means.firewall, &families)?,
            families,
            means,
        })
    }

    /// Everything that matters to these pathways.
    pub(super) async fn read(&self, pathways: &[Pathway]) -> Result<Reading, Error> {
        let firewall = self.firewalls.read().await?;
        let present = self.present(pathways, firewall).await?;
        let (facts, notes) = self.read_facts(pathways, &present).await?;
        Ok(Reading {
            facts,
            present,
            notes,
        })
    }

    /// What of the host decides how the scheme looks, and what a person should know of it.
    pub(super) async fn read_facts(
        &self,
        pathways: &[Pathway],
        present: &Present,
    ) -> Result<(Facts, Vec<String>), Error> {
        let backend = self.firewalls.backend(&present.firewall);
        let mut notes = Vec::new();
        if present.firewall.nftables == Some(Table::Unreadable) {
            let unreadable = firewall::Error::Unreadable;
            match self.goal {
                Goal::Del => return Err(unreadable.into()),
                Goal::Add => notes.push(unreadable.to_string()),
            }
        }
        let served = self.served(pathways, backend, &mut notes)?;
        let still_used = self.still_used(pathways, backend, present, &mut notes);
        let mut facts = self.facts(served, backend, still_used).await?;
        self.read_own(pathways, &mut facts).await?;
        let any_lines = || {
            let with_used = facts.with_used(pathways);
            let mut all = with_used.iter();
            all.any(|one| wants_lines(one, &facts) || !one.interceptions.is_empty())
        };
        if self.goal == Goal::Add && any_lines() {
            self.firewalls.require(backend, Family::V4)?;
        }
        Ok((facts, notes))
    }

    /// What connections still need. Where the kernel cannot say, what is not wanted goes at once.
    fn still_used(
        &self,
        pathways: &[Pathway],
        backend: Backend,
        present: &Present,
        notes: &mut Vec<String>,
    ) -> ByMark {
        if self.goal == Goal::Del {
            return ByMark::new();
        }
        match in_use::still_used(pathways, backend, present) {
            Ok(still_used) => {
                let kept = still_used.iter();
                notes.extend(kept.map(|(mark, ways)| in_use::why_kept(*mark, ways)));
                still_used
            }
            Err(error) => {
                notes.push(format!(
                    "this kernel does not tell which connections are open ({error}): rules that no file wants go at \
                     once, and with them what needs them"
                ));
                ByMark::new()
            }
        }
    }

    /// The families that pathways are served in.
    fn served(
        &self,
        pathways: &[Pathway],
        backend: Backend,
        notes: &mut Vec<String>,
    ) -> Result<Vec<Family>, Error> {
        let connmark = |pathway: &Pathway| {
            pathway.connmark != ConnmarkMode::Off || !pathway.interceptions.is_empty()
        };
        // the kernel asks the interface's own switch, and `all` writes through to it
        let why = if !self.families.contains(&Family::V6) {
            "this kernel runs without IPv6".to_owned()
        } else if switch("/proc/sys/net/ipv6/conf/lo/disable_ipv6")? {
            "IPv6 is switched off (net.ipv6.conf.lo.disable_ipv6)".to_owned()
        } else if self.goal == Goal::Add
            && pathways.iter().any(connmark)
            && self.firewalls.require(backend, Family::V4).is_ok()
            && let Err(firewall::Error::Missing { program, .. }) =
                self.firewalls.require(backend, Family::V6)
        {
            format!("{program} is not installed")
        } else {
            return Ok(Family::BOTH.to_vec());
        };
        if self.goal == Goal::Add {
            notes.push(format!("{why}: the pathways serve IPv4 only"));
        }
        Ok(vec![Family::V4])
    }

    async fn facts(
        &self,
        families: Vec<Family>,
        backend: Backend,
        still_used: ByMark,
    ) -> Result<Facts, Error> {
        let mut facts = Facts {
            families,
            route_localnet: switch("/proc/sys/net/ipv4/conf/all/route_localnet")?,
            default_route: Vec::new(),
            own: BTreeSet::new(),
            backend,
            may_set_sysctls: self.means.set_sysctls,
            still_used,
        };
        for (family, to) in Family::BOTH.into_iter().zip(ANYWHERE) {
            if !facts.families.contains(&family) {
                continue;
            }
            let lookup = self.netlink.lookup(to).await?;
            if lookup != Lookup::Unreachable {
                facts.default_route.push(family);
            }
            // the kernel asks the interface that the packet would leave by
            if let (Family::V4, Lookup::Via(Some(index))) = (family, lookup)
                && let Ok(name) = nix::net::if_::if_indextoname(index)
            {
                let name = name.to_string_lossy();
                let path = format!("/proc/sys/net/ipv4/conf/{name}/route_localnet");
                facts.route_localnet |= switch(&path)?;
            }
        }
        Ok(facts)
    }

    /// Which targets are this host's own.
    async fn read_own(&self, pathways: &[Pathway], facts: &mut Facts) -> Result<(), Error> {
        let mut own = BTreeSet::new();
        for target in facts
            .with_used(pathways)
            .iter()
            .flat_map(|one| &one.targets)
        {
            let single = target.prefix_len() == target.max_prefix_len();
            if single
                && facts.families.contains(&Family::of(target.addr()))
                && self.netlink.lookup(target.addr()).await? == Lookup::Local
            {
                own.insert(target.addr());
            }
        }
        facts.own = own;
        Ok(())
    }

    async fn present(
        &self,
        pathways: &[Pathway],
        firewall: firewall::Found,
    ) -> Result<Present, Error> {
        let mut present = Present {
            firewall,
            switch: Switch::read(self.means.runtime_dir.as_ref())?,
            ..Present::default()
        };
        self.read_rules(&mut present).await?;
        self.read_routes(pathways, &mut present).await?;
        Ok(present)
    }

    pub(super) async fn read_rules(&self, present: &mut Present) -> Result<(), Error> {
        let (mut plain, mut other_lookups) = (BTreeSet::new(), BTreeSet::new());
        for &family in &self.families {
            let rules = self.netlink.rules(family).await?;
            plain.extend(rules.plain);
            other_lookups.extend(rules.other_lookups);
        }
        (present.rules, present.other_lookups) = (plain, other_lookups);
        Ok(())
    }

    /// The routes of the tables that matter, which the rules tell.
    pub(super) async fn read_routes(
        &self,
        pathways: &[Pathway],
        present: &mut Present,
    ) -> Result<(), Error> {
        let tables = plan::tables_to_read(pathways, &present.rules);
        let mut found = Vec::new();
        for &family in &self.families {
            if tables.len() > TABLES_ONE_BY_ONE {
                let routes = self.netlink.routes(family, RoutesOf::Everyone).await?;
                found.extend(routes.into_iter().filter(|route| match route {
                    FoundRoute::LocalDefault(route) => tables.contains(&route.table),
                    FoundRoute::Other { table, .. } => tables.contains(table),
                }));
                continue;
            }
            for &table in &tables {
                let of = RoutesOf::Table(table);
                found.extend(self.netlink.routes(family, of).await?);
            }
        }
        present.routes = found;
        Ok(())
    }

    pub(super) async fn read_firewall(&self, present: &mut Present) -> Result<(), Error> {
        present.firewall = self.firewalls.read().await?;
        Ok(())
    }

    pub(super) fn read_switch(&self, present: &mut Present) -> Result<(), Error> {
        present.switch = Switch::read(self.means.runtime_dir.as_ref())?;
        Ok(())
    }

    /// Whether lines of ours are, or would be, where the kernel tells nobody of a change.
    pub(super) fn is_silent(&self, present: &Present) -> bool {
        self.firewalls.is_silent(&present.firewall)
    }

    /// Applies changes in order; `done` holds what was reached, also on failure.
    async fn apply(&self, changes: &[Change], done: &mut Vec<Step>) -> Result<(), Error> {
        let steps: Vec<Step> = changes
            .iter()
            .map(|change| change.command.clone())
            .collect();
        for batch in steps.chunk_by(same_transaction) {
            let switches = |last: &Step| firewall::is_switch(last, &batch[0]);
            if done.last().is_some_and(switches) {
                firewall::settle();
            }
            self.run(batch).await?;
            done.extend_from_slice(batch);
        }
        Ok(())
    }

    /// One transaction's steps: line steps of one program, or a single step of any other kind.
    pub(super) async fn run(&self, batch: &[Step]) -> Result<(), Error> {
        match batch {
            [Step::AddRule(rule)] => self.netlink.add_rule(rule).await?,
            [Step::DelRule(rule)] => self.netlink.del_rule(rule).await?,
            [Step::AddRoute(route)] => self.netlink.add_route(route).await?,
            [Step::AdoptRoute { route, .. }] => self.netlink.replace_route(route).await?,
            [Step::DelRoute(route)] => self.netlink.del_route(route).await?,
            [step @ (Step::TakeSwitch(_) | Step::LeaveSwitch(_))] => {
                if let Some(runtime_dir) = &self.means.runtime_dir {
                    switch::write(step, runtime_dir)?;
                }
            }
            _ => self.firewalls.write(batch).await?,
        }
        Ok(())
    }

    /// Reads back, and plans again with the same facts: nothing may be left to do.
    async fn verify(&self, goal: Goal, pathways: &[Pathway], facts: &Facts) -> Result<(), Error> {
        let firewall = self.firewalls.read().await?;
        let present = self.present(pathways, firewall).await?;
        let Plan { changes, .. } = plan::plan(goal, pathways, facts, &present);
        match changes.first() {
            None => Ok(()),
            Some(change) => Err(Error::NotVerified(change.command.to_string())),
        }
    }

    /// Takes back what was done, last first, and says what could not be.
    async fn undo(&self, done: Vec<Step>, error: Error) -> Error {
        if done.is_empty() {
            return error;
        }
        let changes = done.len();
        let mut stands = Vec::new();
        let mut back: Vec<Step> = Vec::new();
        for step in done.iter().rev() {
            back.extend(step.inverse());
        }
        for batch in back.chunk_by(same_transaction) {
            if let Err(error) = self.run(batch).await {
                tracing::error!(%error, "cannot take back");
                stands.extend(batch.iter().filter_map(Step::inverse));
            }
        }
        // chains and tables that came with the lines; chains sort before tables
        let mut made = BTreeSet::new();
        for step in &done {
            if let Step::InsertLine(line) = step {
                made.extend(
                    line.made
                        .map(|_| (Made::Chain, line.family, Some(line.chain))),
                );
                made.extend((line.made == Some(Made::Table)).then_some((
                    Made::Table,
                    line.family,
                    None,
                )));
            }
        }
        for (_, family, chain) in made {
            let dropped = match chain {
                Some(chain) => firewall::drop_chain(family, chain),
                None => firewall::drop_table(family),
            };
            if let Err(error) = dropped {
                tracing::error!(%error, "cannot take back");
            }
        }
        let source = Box::new(error);
        if stands.is_empty() {
            return Error::Undone { changes, source };
        }
        let stands: Vec<_> = stands.iter().map(Step::to_string).collect();
        Error::Stands {
            stands: stands.join("; "),
            source,
        }
    }
}
