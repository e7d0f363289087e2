//! What a process does before its event loop: configuration, locks, sockets that were passed, limits.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::rc::Rc;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::{debug, warn};

use super::Patience;
use super::fleet::{Fleet, Selection};
use super::handover::Inheritance;
use super::keeper::Kept;
use super::process::Process;
use super::relay::{World, lock_name};
use super::remedy::Maker;
use crate::cli::{Global, RunArgs};
use crate::commands::doctor::patients;
use crate::commands::output::results;
use crate::commands::own;
use crate::commands::{UsageError, drawn};
use crate::config::{Configuration, Origin};
use crate::relay::workers::{IoUring, Workers};
use crate::runtime_dir::{Attempt, Lock, RuntimeDir};
use crate::socket;
use crate::socket::listening::Listening;
use crate::systemd;

/// The lock and the control socket of a process that runs all instances; no instance's name ends so.
const ALL: &str = "all.process";

/// Everything that needs no event loop, or `None` where another process does it already.
pub(super) fn start(
    global: &Global,
    args: RunArgs,
    (origin, patience): (Origin, Patience),
    inheritance: Option<Inheritance>,
    passed: Vec<systemd::Passed>,
    keeper: Kept,
) -> anyhow::Result<Option<Process>> {
    // the file may be replaced while we run, and /proc/self/exe then names one that is gone
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let mut configuration = origin.load()?;
    configuration.warn_of_own(own::look);
    if !configuration.warnings.is_empty() && !global.quiet {
        eprintln!("{}\n", drawn(&configuration.warnings));
    }
    let selection = match &origin {
        Origin::Files(_) => select(&configuration, &args)?,
        Origin::Standalone(_) => Selection::Standalone,
    };
    let runtime_dir = RuntimeDir::resolve(global.runtime_dir.clone());
    let (listeners, mut locks, control) = match inheritance {
        Some(all) => (all.listeners, all.locks, all.control),
        None => (Vec::new(), BTreeMap::new(), None),
    };
    let name = match &selection {
        Selection::All => ALL.to_owned(),
        Selection::Named(names) => lock_name(names.first().map_or("", String::as_str)),
        Selection::Standalone => lock_name(
            configuration
                .instances
                .first()
                .map_or("", |instance| instance.name.as_str()),
        ),
    };
    // the first of several names the process: two processes cannot both run it
    let lock = match locks.remove(&name) {
        Some(lock) => lock,
        None => match runtime_dir.try_lock(&name)? {
            Attempt::Held(lock) => lock,
            Attempt::HeldBy(pid) => {
                let pid = pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
                let shown = match &selection {
                    Selection::All => "all instances",
                    Selection::Named(names) => &names[0],
                    // it has the address, and perhaps other targets
                    Selection::Standalone => bail!(
                        "{} is served already, by pid {pid}",
                        name.trim_end_matches(&lock_name(""))
                    ),
                };
                writeln!(results(), "{shown}: already running, pid {pid}")?;
                return Ok(None);
            }
        },
    };
    let mut held = None;
    if selection == Selection::All {
        held = Some(lock);
    } else {
        locks.insert(name.clone(), lock);
    }
    match socket::may_spoof() {
        Err(failure) if failure.errno() == Some(Errno::EPERM) => bail!(
            "relaying with the client's address needs root or CAP_NET_ADMIN (systemd: AmbientCapabilities=CAP_NET_ADMIN)"
        ),
        outcome => outcome.context("cannot make a spoofed socket")?,
    }
    raise_descriptor_limit();
    refuse_huge_pages();
    let locks = by_instance(locks);
    let inherited = match &control {
        Some(_) => locks.keys().cloned().collect(),
        None => BTreeSet::new(),
    };
    let count = args
        .workers
        .unwrap_or_else(|| std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
    let io_uring = match args.no_io_uring {
        true => IoUring::Off,
        false => IoUring::Auto,
    };
    let world = World {
        workers: Workers::start_with(count, io_uring).context("cannot start the worker threads")?,
        runtime_dir,
        no_check: args.no_check,
        maker: Maker::of(&origin, patience, args.manage_pathways),
        firewall: global.firewall,
        set_sysctls: global.set_sysctls,
        configuration: RefCell::new(Rc::new(configuration)),
        instances: std::cell::Cell::new(0),
        locks: RefCell::new(locks),
        offered: RefCell::default(),
        look: tokio::sync::Mutex::default(),
    };
    listeners
        .into_iter()
        .for_each(|listener| world.offer(listener));
    take_passed(&world, passed)?;
    Ok(Some(Process {
        asker: patients::asker(global),
        fleet: Rc::new(Fleet::new(
            selection,
            Rc::new(world),
            origin,
            args.manage_pathways.then(|| name.clone()),
        )),
        args,
        patience,
        program,
        name,
        lock: held,
        control,
        inherited,
        keeper,
    }))
}

/// Locks of instances, by the instance's name.
fn by_instance(locks: BTreeMap<String, Lock>) -> BTreeMap<String, Lock> {
    locks
        .into_iter()
        .filter_map(|(name, lock)| Some((name.strip_suffix(&lock_name(""))?.to_owned(), lock)))
        .collect()
}

fn select(configuration: &Configuration, args: &RunArgs) -> anyhow::Result<Selection> {
    if args.all {
        return Ok(Selection::All);
    }
    for name in &args.instances {
        if configuration.instance(name).is_none() {
            let known: Vec<_> = configuration
                .instances
                .iter()
                .map(|instance| instance.name.as_str())
                .collect();
            return Err(UsageError(format!(
                "no instance '{name}' in {}: there are {}",
                configuration.directory.join("instances.tsv").display(),
                if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                }
            ))
            .into());
        };
    }
    Ok(Selection::Named(args.instances.clone()))
}

/// Sockets of a socket unit, or from systemd's store, belong to the instance of their name.
fn take_passed(world: &World, passed: Vec<systemd::Passed>) -> anyhow::Result<()> {
    for systemd::Passed { name, descriptor } in passed {
        let listening = Listening::from_descriptor(descriptor)
            .with_context(|| format!("cannot use the socket that systemd passed for {name}"))?;
        let Some(listening) = listening else {
            warn!(
                name,
                "systemd passed a descriptor that is neither a listening TCP socket nor a UDP socket: closed"
            );
            systemd::forget(&name);
            continue;
        };
        let (protocol, endpoint) = listening
            .place()
            .context("a passed socket has no address")?;
        let configuration = world.configuration.borrow();
        match configuration.instance(&name) {
            Some(instance)
                if instance.options.protocol == protocol && instance.listen.has(&endpoint) =>
            {
                world.offer(listening);
            }
            Some(instance) => {
                warn!(
                    instance = name, listen = %instance.listen, passed = %endpoint, %protocol,
                    "the socket that systemd passed has another address or protocol than instances.tsv: closed"
                );
                systemd::forget(&name);
            }
            None => {
                warn!(name, passed = %endpoint, "systemd passed a socket whose name is no instance's: closed");
                systemd::forget(&name);
            }
        }
    }
    Ok(())
}

/// Idle connections are many and small: in huge pages the process would grow by 2 MiB at a time.
fn refuse_huge_pages() {
    if let Err(errno) = nix::sys::prctl::set_thp_disable(true) {
        debug!(error = %io::Error::from(errno), "cannot do without huge pages");
    }
}

/// Each connection takes two descriptors; the soft limit is usually 1024 for the sake of select(2).
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok(())
    });
    if let Err(errno) = raised {
        warn!(error = %io::Error::from(errno), "cannot raise the limit on open files");
    }
}
