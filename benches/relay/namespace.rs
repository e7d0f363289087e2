//! A fresh network namespace with the return route installed: the same kernel state for every program.
//!
//! Owns: the namespace, its rules, routes and CONNMARK rules, and starting programs in it. Must not know:
//! which program, what is measured. The rules are written here with `ip` and `iptables` rather than with
//! `mmproxyctl pathway add`, so that the state is the same for all even when the program under test changes.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

/// The mark of the pathway, and its table.
pub(crate) const MARK: u32 = 123;

/// The scheme of `pathway add 123` for loopback targets, without CONNMARK.
const ROUTES: &[&str] = &[
    "link set lo up",
    "rule add priority 100 from 127.0.0.0/8 fwmark 123/0xff iif lo lookup 123",
    "rule add priority 200 from 127.0.0.0/8 iif lo lookup 123",
    "route add local default dev lo table 123",
    "-6 rule add priority 100 from ::1 fwmark 123/0xff iif lo lookup 123",
    "-6 rule add priority 200 from ::1 iif lo lookup 123",
    "-6 route add local default dev lo table 123",
];

/// The CONNMARK rules of the same pathway.
const CONNMARK: &[&str] = &[
    "-A OUTPUT -m mark --mark 123/0xff -j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff",
    "-A OUTPUT -m connmark --mark 123/0xff -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff",
    "-A PREROUTING -m connmark --mark 123/0xff -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff",
];

/// A network namespace that lives as long as the value and the programs in it.
#[derive(Clone)]
pub(crate) struct Namespace(Arc<File>);

impl Namespace {
    /// A namespace with `lo` up and the pathway in place.
    ///
    /// # Errors
    /// Without root, or when `ip` or `iptables` refuses.
    pub(crate) fn new(connmark: bool) -> Result<Self> {
        let file = std::thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)
                .context("cannot make a network namespace (this needs root)")?;
            File::open("/proc/thread-self/ns/net").context("cannot open the namespace")
        })
        .join()
        .map_err(|_| anyhow::anyhow!("the namespace thread panicked"))??;
        let namespace = Self(Arc::new(file));
        for words in ROUTES {
            namespace.run("ip", words)?;
        }
        if connmark {
            for words in CONNMARK {
                namespace.run("iptables", &format!("-w -t mangle {words}"))?;
                namespace.run("ip6tables", &format!("-w -t mangle {words}"))?;
            }
            // tens of thousands of reset connections a second would fill the table with dead entries,
            // and the packets dropped then would be counted against the relay
            namespace.enter(|| {
                for state in ["close", "time_wait", "last_ack", "close_wait", "fin_wait"] {
                    let path = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{state}");
                    std::fs::write(&path, "1").with_context(|| format!("cannot write {path}"))?;
                }
                Ok(())
            })?;
        }
        Ok(namespace)
    }

    /// Moves the calling thread into the namespace, for good.
    ///
    /// # Errors
    /// Without root.
    pub(crate) fn join(&self) -> Result<()> {
        setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")
    }

    /// Runs a closure on a thread of the namespace: the sockets it makes belong there.
    ///
    /// # Errors
    /// What the closure returns.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.join()?;
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that will run in the namespace, in a process group of its own, and end with the harness.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).process_group(0);
        let namespace = Arc::clone(&self.0);
        // SAFETY: prctl and setns are async-signal-safe; the descriptor is kept open by the closure
        #[expect(
            unsafe_code,
            reason = "pre_exec is the only way to start a child in another namespace"
        )]
        unsafe {
            command.pre_exec(move || {
                set_pdeathsig(Signal::SIGTERM)?;
                Ok(setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?)
            });
        }
        command
    }

    fn run(&self, program: &str, words: &str) -> Result<()> {
        let output = self
            .command(program)
            .args(words.split_whitespace())
            .output()
            .with_context(|| format!("cannot run {program}: run benches/install-peers.sh"))?;
        if !output.status.success() {
            bail!(
                "{program} {words}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}
