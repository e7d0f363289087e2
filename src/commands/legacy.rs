//! Called as `go-mmproxy` or `mmproxy`: the old flags, brought to the machinery of `run`.

use std::ffi::{CString, OsString};
use std::io::Write;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, anyhow};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tracing::{info, warn};

use super::output::results;
use super::{UsageError, run};
use crate::cli::{Global, LogFormat, RunArgs};
use crate::compat::{self, Ancestor, Destination, Invocation, Listening, OldName, Place};
use crate::config::{self, Origin, Relays, Standalone, Trusted};
use crate::logging;
use crate::model::{
    ConnmarkMode, Family, Instance, InstanceOptions, Listen, ListenAddr, ListenMode, Mark,
    NamedTargets, Pathway, Protocol, TableId, TargetPorts,
};
use crate::pathway::{self, Firewall};
use crate::runtime_dir::RuntimeDir;

/// Runs what the old flags ask for.
pub(super) fn run(
    name: OldName,
    argv0: OsString,
    words: impl Iterator<Item = OsString>,
) -> anyhow::Result<ExitCode> {
    // pkill and killall look for it, and after findable() it would be that of /proc/self/exe
    if let Ok(called) = CString::new(name.name()) {
        let _ = nix::sys::prctl::set_name(&called);
    }
    let words: Vec<String> = words
        .map(|word| {
            let shown = word.to_string_lossy().into_owned();
            word.into_string()
                .map_err(|_| UsageError(format!("'{shown}' is not UTF-8")))
        })
        .collect::<Result<_, _>>()?;
    let invocation = compat::parse(name, &words).map_err(|error| UsageError(error.to_string()))?;
    let (relays, trusted, verbosity, suggest) = match invocation {
        Invocation::Help => {
            write!(results(), "{}", compat::flags::help(name))?;
            return Ok(ExitCode::SUCCESS);
        }
        Invocation::Version => {
            println!(
                "mmproxyctl {} as {}",
                env!("CARGO_PKG_VERSION"),
                name.name()
            );
            return Ok(ExitCode::SUCCESS);
        }
        Invocation::Json(file) => {
            let (form, _) = config::read_json(&file, config::has_ipv6())?;
            (Relays::Json(file), None, form.verbosity, None)
        }
        Invocation::Relay(relay) => {
            findable(name, &argv0, &words);
            let verbosity = relay.verbosity;
            let suggest = relay.suggest.zip(relay.mark);
            let allow = relay.allow.clone();
            let notes = relay.notes.clone();
            let warnings: Vec<_> = warnings(&relay).collect();
            let instances = instances(*relay)?;
            logging::init(&global(verbosity, None));
            notes.iter().for_each(|note| warn!("{note}"));
            warnings.iter().for_each(|warning| warn!("{warning}"));
            (Relays::Given(instances), allow, verbosity, suggest)
        }
    };
    let runtime = UsableDir::find()?;
    let global = global(verbosity, runtime.path());
    logging::init(&global);
    if let UsableDir::Private { instead_of, .. } = &runtime {
        warn!(
            "cannot write to {}: mmproxyctl status will not find this process (systemd: RuntimeDirectory=mmproxy)",
            instead_of.display()
        );
    }
    let trusted = match trusted {
        Some(file) => Trusted::File(file),
        None => {
            warn!(
                "no allow list: everyone who can connect here may claim to be any client \
                 (-allowed-subnets FILE names the proxies that are believed)"
            );
            Trusted::Everyone
        }
    };
    if let Some((table, mark)) = suggest {
        suggest_routing(table, mark);
    }
    let origin = Origin::Standalone(Standalone {
        relays,
        trusted,
        directory: global.config_dir.clone(),
    });
    run::run_from(&global, run_args(), origin, run::Patience::GiveUp)
}

fn global(verbosity: u8, runtime_dir: Option<&Path>) -> Global {
    let config_dir = std::env::var_os("MMPROXY_CONFIG_DIR").filter(|dir| !dir.is_empty());
    Global {
        config_dir: config_dir.map_or_else(|| PathBuf::from("/etc/mmproxy"), PathBuf::from),
        runtime_dir: runtime_dir.map(Path::to_owned),
        log_format: LogFormat::Auto,
        verbose: verbosity,
        firewall: Firewall::default(),
        set_sysctls: false,
        quiet: false,
    }
}

/// As a unit of go-mmproxy starts it: no look at the pathway, for the routing may be of any make.
fn run_args() -> RunArgs {
    RunArgs {
        no_check: true,
        drain_timeout: Duration::from_secs(30),
        ..RunArgs::default()
    }
}

/// Starts this program anew, in the same process, where its flags stand in another order than the one
/// in which start scripts look for them (`pgrep -f`). Where that fails the relay runs all the same.
fn findable(name: OldName, argv0: &OsString, words: &[String]) {
    if let Some(ordered) = compat::flags::listen_before_mark(name, words) {
        let error = Command::new("/proc/self/exe")
            .arg0(argv0)
            .args(ordered)
            .exec();
        eprintln!("cannot put -l before -mark for scripts that look for them: {error}");
    }
}

/// One instance for each family that Go would listen on.
fn instances(relay: compat::Relay) -> anyhow::Result<Vec<Instance>> {
    let listen = resolve(&relay.listen, |_| true)?;
    let listens = match relay.ancestor {
        Ancestor::Go => compat::places(listen, config::has_ipv6()),
        Ancestor::Rust | Ancestor::Cloudflare => vec![listen],
    };
    let mut options = InstanceOptions::defaults(relay.protocol);
    let (mut target4, mut target6) = (None, None);
    match relay.destination {
        Destination::Header => options.destinations = Some(Family::BOTH.map(everywhere).into()),
        Destination::Targets => {
            if let SocketAddr::V4(addr) = resolve(&relay.target4, SocketAddr::is_ipv4)? {
                target4 = Some(addr);
            }
            if let SocketAddr::V6(addr) = resolve(&relay.target6, SocketAddr::is_ipv6)? {
                target6 = Some(addr);
            }
        }
    }
    if relay.listening == Listening::Transparent {
        options.listen = ListenMode::Transparent;
    }
    options.listeners = Some(relay.listeners);
    options.port = relay.port;
    if relay.protocol == Protocol::Udp {
        options.idle_timeout = Some(relay.close_after);
    }
    listens
        .into_iter()
        .map(|listen| instance(&relay, listen, (target4, target6), options.clone()))
        .collect()
}

fn instance(
    relay: &compat::Relay,
    listen: SocketAddr,
    (target4, target6): (Option<SocketAddrV4>, Option<SocketAddrV6>),
    options: InstanceOptions,
) -> anyhow::Result<Instance> {
    // the checks of a listen address: multicast, link-local without an interface
    let checked: ListenAddr = listen
        .to_string()
        .parse()
        .map_err(|error| UsageError(format!("-l: {error}")))?;
    Ok(Instance {
        name: compat::relay_name(relay.protocol, listen)
            .map_err(|error| UsageError(format!("-l: {error}")))?,
        mark: relay.mark,
        listen: match options.listen {
            ListenMode::Own => checked.into(),
            ListenMode::Transparent => Listen::from(checked)
                .transparent()
                .map_err(|error| UsageError(format!("-l: {error}")))?,
        },
        target4,
        target6,
        target_ports: TargetPorts::One,
        named: NamedTargets::default(),
        options,
    })
}

/// What the flags of a relay leave open to whoever is believed, or leave to others.
fn warnings(relay: &compat::Relay) -> impl Iterator<Item = &'static str> {
    let header = (relay.destination == Destination::Header).then_some(
        "-dynamic-destination: who is believed can have a connection made to any address that this host \
         reaches, its own services included (mmproxyctl run: --target header --destinations NET+NET)",
    );
    let transparent = (relay.listening == Listening::Transparent).then_some(
        "-listen-transparent: the TPROXY rules are your own, none is made for it (mmproxyctl makes them for \
         listen=transparent in instances.tsv: pathway add)",
    );
    header.into_iter().chain(transparent)
}

/// All addresses of a family.
fn everywhere(family: Family) -> IpNet {
    match family {
        Family::V4 => IpNet::V4(Ipv4Net::default()),
        Family::V6 => IpNet::V6(Ipv6Net::default()),
    }
}

/// The first address of the wanted kind.
fn resolve(place: &Place, wanted: impl Fn(&SocketAddr) -> bool) -> anyhow::Result<SocketAddr> {
    match place {
        Place::Addr(addr) => Ok(*addr),
        Place::Name { host, port } => (host.as_str(), *port)
            .to_socket_addrs()
            .with_context(|| format!("cannot look up '{host}'"))?
            .find(wanted)
            .ok_or_else(|| anyhow!("'{host}' has no address of the family that is needed")),
    }
}

/// What cloudflare/mmproxy prints at its start: the routing to have, and whether it is there.
fn suggest_routing(table: TableId, mark: Mark) {
    let Some(mut wanted) = Pathway::with_defaults(mark) else {
        return;
    };
    wanted.table = table;
    wanted.connmark = ConnmarkMode::Auto;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let findings = match runtime {
        Ok(runtime) => runtime.block_on(pathway::check(&[wanted], Firewall::default())),
        Err(error) => return warn!(%error, "cannot look at the routing"),
    };
    match findings {
        Ok(findings) if findings.is_empty() => {
            info!(%mark, %table, "the routing that leads replies back is in place");
        }
        Ok(findings) => {
            info!(
                "routing for mark {mark} and table {table} as mmproxyctl pathway add {mark} makes it with \
                 table={table} in pathways.conf, unless rules of your own do the same (--quiet leaves this out):"
            );
            findings.iter().for_each(|finding| info!("  {finding}"));
        }
        Err(error) => warn!(%error, "cannot look at the routing"),
    }
}

/// A directory for the lock and the control socket.
#[derive(Debug)]
enum UsableDir {
    /// The usual one.
    Usual,
    /// An old unit has no RuntimeDirectory=, and its dynamic user may not write to /run.
    Private { path: PathBuf, instead_of: PathBuf },
}

impl UsableDir {
    fn find() -> anyhow::Result<Self> {
        let usual = RuntimeDir::resolve(None).path().to_owned();
        let writable = std::fs::create_dir_all(&usual).is_ok()
            && nix::unistd::access(&usual, nix::unistd::AccessFlags::W_OK).is_ok();
        if writable {
            return Ok(Self::Usual);
        }
        let template = std::env::temp_dir().join("mmproxy-XXXXXX");
        let path = nix::unistd::mkdtemp(&template).with_context(|| {
            format!(
                "cannot make a directory in {}",
                std::env::temp_dir().display()
            )
        })?;
        Ok(Self::Private {
            path,
            instead_of: usual,
        })
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Self::Usual => None,
            Self::Private { path, .. } => Some(path),
        }
    }
}

impl Drop for UsableDir {
    fn drop(&mut self) {
        if let Self::Private { path, .. } = self {
            // nothing but a lock and a socket of this process is in it
            let _ = std::fs::remove_dir_all(path);
        }
    }
}
