//! A process that stands in for the one that relays, so that the service manager sees its main process end
//! while open connections go on.
//!
//! systemd restarts a service once its main process has ended, and no process can be replaced as the main one
//! while the service stops. So, where asked for, the first process only passes signals on to its
//! child, which relays, and ends with the child's exit code; or before the child, once the child lets it go.
//! If it dies in any other way, the child dies with it: a relay that nobody looks after is none.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid, setpgid};
use tokio::time::{Instant, sleep};
use tracing::warn;

/// What the child says when it lets its keeper go.
const LET_GO: Signal = Signal::SIGUSR1;
/// How long the keeper may take to be gone then.
const PATIENCE: Duration = Duration::from_secs(5);
/// They name the process that they are for, which is to be the child.
const ADDRESSED: [&str; 2] = ["LISTEN_PID", "WATCHDOG_PID"];

/// Which of the two a process is.
#[derive(Debug)]
pub(super) enum Side {
    /// The one that stood in; it has nothing more to do but end so.
    Keeper(ExitCode),
    /// The one that relays.
    Kept(Kept),
}

/// The child's hold on its keeper, where it has one.
#[derive(Debug)]
pub(super) struct Kept(Option<Pid>);

/// Makes two of the process. The first returns once it may end. Only while there is a single thread.
pub(super) fn part() -> io::Result<Side> {
    let parent = getpid();
    let mut signals = SigSet::empty();
    let all = [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGCHLD,
        LET_GO,
    ];
    all.into_iter().for_each(|signal| signals.add(signal));
    // waited for by the one and, until it handles them, kept for the other: none is lost
    let before = signals.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    // SAFETY: no other thread exists yet, so that no lock is held by one that the child has not
    #[expect(unsafe_code, reason = "fork is what this is about")]
    let forked = unsafe { fork() }?;
    match forked {
        ForkResult::Parent { child } => Ok(Side::Keeper(keep(child, &signals)?)),
        ForkResult::Child => {
            become_kept(parent)?;
            before.thread_set_mask()?;
            Ok(Side::Kept(Kept(Some(parent))))
        }
    }
}

fn become_kept(parent: Pid) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        return Err(io::Error::other("the process that stands in is gone"));
    }
    // a Ctrl-C comes once, by way of the keeper: twice would mean to cut what is open
    setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    let to_parent = parent.to_string();
    for name in ADDRESSED {
        if std::env::var(name).is_ok_and(|pid| pid == to_parent) {
            // SAFETY: no other thread exists yet that could read the environment
            #[expect(unsafe_code, reason = "libraries look for these in the environment")]
            unsafe {
                std::env::set_var(name, getpid().to_string());
            }
        }
    }
    Ok(())
}

/// Passes signals on until the child has ended or lets go.
fn keep(child: Pid, signals: &SigSet) -> io::Result<ExitCode> {
    close_inherited()?;
    loop {
        match signals.wait()? {
            LET_GO => return Ok(ExitCode::SUCCESS),
            Signal::SIGCHLD => match waitpid(child, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::Exited(_, code) => {
                    return Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from));
                }
                WaitStatus::Signaled(_, signal, _) => {
                    // whoever waits for us shall learn how it ended
                    signals.thread_unblock()?;
                    raise(signal)?;
                    return Ok(ExitCode::FAILURE);
                }
                _ => {}
            },
            // it may have ended meanwhile, which the next signal says
            signal => match kill(child, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(errno.into()),
            },
        }
    }
}

/// Sockets that were passed are the child's: as long as anybody has a listener open, the kernel takes
/// connections for it.
fn close_inherited() -> io::Result<()> {
    // SAFETY: nothing in this process uses a descriptor above stderr from here on
    #[expect(unsafe_code, reason = "descriptors that were passed are numbers")]
    let closed = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    Errno::result(closed)?;
    Ok(())
}

impl Kept {
    /// Of a process that nobody stands in for.
    pub(super) fn by_nobody() -> Self {
        Self(None)
    }

    /// The main process towards the service manager.
    pub(super) fn main_pid(&self) -> u32 {
        let pid = self.0.unwrap_or_else(getpid);
        u32::try_from(pid.as_raw()).unwrap_or_default()
    }

    /// Lets the keeper end, and waits until it has.
    pub(super) async fn let_go(&self) {
        let Some(keeper) = self.0 else { return };
        let told = prctl::set_pdeathsig(None).and_then(|()| kill(keeper, LET_GO));
        if let Err(errno) = told {
            warn!(error = %io::Error::from(errno), "cannot let the main process end");
            return;
        }
        let end = Instant::now() + PATIENCE;
        while getppid() == keeper {
            if Instant::now() >= end {
                warn!(pid = keeper.as_raw(), "the main process does not end");
                return;
            }
            sleep(Duration::from_millis(2)).await;
        }
    }
}
