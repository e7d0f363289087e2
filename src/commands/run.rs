//! `run`: one instance's relay in the foreground, from its line in instances.tsv to a drained end.

mod relay;

use std::io;
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{info, warn};

use super::{UsageError, drawn};
use crate::cli::{Global, RunArgs};
use crate::config::{self, Configuration};
use crate::model::Instance;
use crate::pathway;
use crate::runtime_dir::{Attempt, RuntimeDir};
use crate::socket;

use self::relay::Relay;

/// Runs the verb.
pub(super) fn run(global: &Global, args: RunArgs) -> anyhow::Result<ExitCode> {
    let configuration = config::load(&global.config_dir)?;
    if !configuration.warnings.is_empty() && !global.quiet {
        eprintln!("{}\n", drawn(&configuration.warnings));
    }
    let instance = named(&configuration, &args.instance)?;
    // an instance may be called "pathways", which is a lock of its own; held until the process ends, and dropped with it by the kernel however it ends
    let _lock = match RuntimeDir::resolve(global.runtime_dir.clone())
        .try_lock(&format!("{}.instance", instance.name))?
    {
        Attempt::Held(lock) => lock,
        Attempt::HeldBy(pid) => {
            let pid = pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
            println!("{}: already running, pid {pid}", instance.name);
            return Ok(ExitCode::SUCCESS);
        }
    };
    match socket::may_spoof() {
        Err(failure) if failure.errno() == Some(Errno::EPERM) => bail!(
            "relaying with the client's address needs root or CAP_NET_ADMIN (systemd: AmbientCapabilities=CAP_NET_ADMIN)"
        ),
        outcome => outcome.context("cannot make a spoofed socket")?,
    }
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(&configuration, instance, &args))
}

fn named<'c>(configuration: &'c Configuration, name: &str) -> anyhow::Result<&'c Instance> {
    let Some(instance) = configuration.instance(name) else {
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
    Ok(instance)
}

async fn serve(
    configuration: &Configuration,
    instance: &Instance,
    args: &RunArgs,
) -> anyhow::Result<ExitCode> {
    // before anything else: a signal that comes during the start is not lost
    let mut signals = Signals::new()?;
    if !args.no_check {
        in_place(configuration, instance).await?;
    }
    let workers = match args.workers {
        Some(workers) => workers,
        None => std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
    };
    let listeners = match instance.options.listeners {
        Some(count) => NonZeroUsize::try_from(count).unwrap_or(workers),
        None => workers,
    };
    let (mut relay, address_missing) = Relay::start(configuration, instance, workers, listeners)
        .with_context(|| format!("instance {}", instance.name))?;
    if address_missing {
        warn!(
            instance = %instance.name, listen = %instance.listen,
            "the listen address is on no interface yet: listening all the same, {} arrive once it is there",
            relay.units()
        );
    }
    info!(
        instance = %instance.name, listen = %instance.listen, mark = %instance.mark,
        target4 = instance.target4.map(tracing::field::display),
        target6 = instance.target6.map(tracing::field::display),
        workers, listeners, "relaying"
    );
    notify(&[NotifyState::Ready]);
    tokio::select! {
        ended = relay.ended() => {
            ended?;
            bail!("the relay ended by itself");
        }
        name = signals.next() => stop(&mut relay, &mut signals, name, args.drain_timeout).await?,
    }
    relay.say_ended(&instance.name);
    Ok(ExitCode::SUCCESS)
}

/// Refuses to start where a reply would never find its way back: such a relay only times out.
async fn in_place(configuration: &Configuration, instance: &Instance) -> anyhow::Result<()> {
    let mark = instance.mark;
    let pathway = configuration
        .pathway(mark)
        .with_context(|| format!("no pathway has mark {mark}"))?;
    let findings = pathway::check(std::slice::from_ref(pathway))
        .await
        .with_context(|| format!("cannot check the pathway of mark {mark}"))?;
    let Some(first) = findings.first() else {
        return Ok(());
    };
    let missing: Vec<_> = findings
        .iter()
        .map(|finding| format!("\n  {finding}"))
        .collect();
    bail!(
        "instance {}: its pathway, mark {mark}, is not in place:{}\nrun: {} (or start with --no-check)",
        instance.name,
        missing.concat(),
        first.fix()
    )
}

/// Nothing new; what is open has until the drain timeout, or until the next signal.
async fn stop(
    relay: &mut Relay,
    signals: &mut Signals,
    signal: &str,
    drain_timeout: Duration,
) -> anyhow::Result<()> {
    notify(&[NotifyState::Stopping]);
    relay.drain();
    info!(
        signal,
        active = relay.active(),
        ?drain_timeout,
        "stopping: no new {}",
        relay.units()
    );
    tokio::select! {
        ended = relay.ended() => return ended,
        () = tokio::time::sleep(drain_timeout) => {
            warn!(active = relay.active(), "the drain timeout is over: the rest is cut");
        }
        signal = signals.next() => {
            warn!(signal, active = relay.active(), "a second signal: the rest is cut");
        }
    }
    relay.end();
    relay.ended().await
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let install = |kind| signal(kind).context("cannot handle signals");
        Ok(Self {
            terminate: install(SignalKind::terminate())?,
            interrupt: install(SignalKind::interrupt())?,
        })
    }

    /// The next one's name. Cancel-safe.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

fn notify(state: &[NotifyState]) {
    // without systemd there is nobody to tell, which is no error
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "cannot notify systemd");
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
