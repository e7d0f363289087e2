//! A host with one of everything that a pathway can lead to, on which faults are shown.
//!
//! wks01 has services on loopback and on its own address, a container behind a bridge, and a host whose
//! gateway it is; the proxy's host is its default gateway. Four namespaces, wired and driven by shell
//! commands as an administrator would type them. Must not know: pathways, what a fault is called.

pub mod ills;

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use self::ills::{Ill, Remedy};
use super::namespace::{Error as NamespaceError, Namespace};

/// Where services listen: TCP, and UDP. Those on wks01's own addresses listen one port further on.
const PORTS: (u16, u16) = (8080, 5353);

/// How long an address may stay taken by a service that was stopped.
const LET_GO: Duration = Duration::from_secs(2);

/// Why there is no clinic, or a command in it failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No namespace.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// A file or a program.
    #[error("cannot {operation}")]
    System {
        /// What was tried.
        operation: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A command ended with a failure.
    #[error("{command}: {status}: {said}")]
    Failed {
        /// The command.
        command: String,
        /// How it ended.
        status: String,
        /// What it wrote.
        said: String,
    },
}

fn system(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let operation = operation.into();
    move |source| Error::System { operation, source }
}

/// Lays cables and gives addresses. `$LAN`, `$CONTAINER` and `$ROUTED` are the other namespaces.
const CABLES: &str = "
for host in '' \"$LAN\" \"$CONTAINER\" \"$ROUTED\"; do
    ${host:+nsenter --net=$host} sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
done
ip -batch - <<END
link add eth0 type veth peer name eth0 netns $LAN
link add eth1 type veth peer name eth0 netns $ROUTED
link add veth0 type veth peer name eth0 netns $CONTAINER
link add br0 type bridge
link set veth0 master br0
address add 10.0.0.2/24 dev eth0
address add fd00::2/64 dev eth0 nodad
address add 10.9.0.1/24 dev eth1
address add fd00:9::1/64 dev eth1 nodad
address add 172.20.0.1/24 dev br0
address add fd00:20::1/64 dev br0 nodad
link set eth0 up
link set eth1 up
link set veth0 up
link set br0 up
END
far() {
    nsenter --net=\"$1\" ip -batch - <<END
address add $2 dev eth0
address add $3 dev eth0 nodad
link set eth0 up
route add default via $4
route add default via $5
END
}
far \"$LAN\" 10.0.0.1/24 fd00::1/64 10.0.0.2 fd00::2
far \"$ROUTED\" 10.9.0.2/24 fd00:9::2/64 10.9.0.1 fd00:9::1
far \"$CONTAINER\" 172.20.0.2/24 fd00:20::2/64 172.20.0.1 fd00:20::1
ip route add default via 10.0.0.1
ip -6 route add default via fd00::1
# a fresh interface has no carrier, and so no IPv6 route, for some milliseconds
tries=0
until ip -6 route get fd00:20::2 >/dev/null 2>&1 && ip -6 route get fd00:9::2 >/dev/null 2>&1 &&
      nsenter --net=\"$ROUTED\" ip -6 route get fd00::2 >/dev/null 2>&1 &&
      nsenter --net=\"$CONTAINER\" ip -6 route get fd00::2 >/dev/null 2>&1 &&
      ! ip -6 address show tentative | grep -q inet6; do
    tries=$((tries + 1)); [ $tries -lt 500 ]; sleep 0.01
done
";

/// What every script here may call.
const PRELUDE: &str = "set -eu
listening() {
    tries=0
    until [ -n \"$(ss -Hltn \"sport = :$1\")\" ]; do tries=$((tries + 1)); [ $tries -lt 500 ]; sleep 0.02; done
}
proxy() { port=$1; shift; nsenter --net=\"$LAN\" timeout 1 mmproxyctl probe \"10.0.0.2:$port\" --client 192.0.2.77:4000 \"$@\"; }
";

/// The configuration that every fault begins with.
const FILES: [(&str, &str); 3] = [
    ("pathways.conf", "123\n"),
    (
        "instances.tsv",
        "local\t123\t10.0.0.2:2201\t127.0.0.1\t8080\t::1
own\t123\t10.0.0.2:2202\t10.0.0.2\t8081\tfd00::2
container\t123\t10.0.0.2:2203\t172.20.0.2\t8080\tfd00:20::2
routed\t123\t10.0.0.2:2204\t10.9.0.2\t8080\tfd00:9::2
local-udp\t123\t10.0.0.2:2205\t127.0.0.1\t5353\t::1\tprotocol=udp
own-udp\t123\t10.0.0.2:2206\t10.0.0.2\t5354\tfd00::2\tprotocol=udp
container-udp\t123\t10.0.0.2:2207\t172.20.0.2\t5353\tfd00:20::2\tprotocol=udp
routed-udp\t123\t10.0.0.2:2208\t10.9.0.2\t5353\tfd00:9::2\tprotocol=udp
",
    ),
    ("allow.txt", "10.0.0.1\nfd00::1\n"),
];

/// A service. Nobody accepts: the kernel answers for its socket, and probes end with a reset.
struct Service {
    udp: bool,
    address: SocketAddr,
    _socket: OwnedFd,
}

/// The four hosts. Ends with the value, and with it every program on them.
pub struct Clinic {
    wks01: Namespace,
    lan: Namespace,
    container: Namespace,
    routed: Namespace,
    directory: PathBuf,
    program: PathBuf,
    services: Vec<Service>,
    daemons: Vec<Child>,
}

impl std::fmt::Debug for Clinic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clinic")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Clinic {
    /// Four fresh hosts, their services and files. `directory` is theirs alone and empty; `program` is
    /// the mmproxyctl that `mmproxyctl` means there.
    ///
    /// # Errors
    /// When the kernel or a program (`ip`, `nsenter`, `sysctl`) does not do its part.
    pub fn build(directory: &Path, program: &Path) -> Result<Self, Error> {
        let mut clinic = Self {
            wks01: Namespace::new("wks01")?,
            lan: Namespace::new("lan")?,
            container: Namespace::new("container")?,
            routed: Namespace::new("routed")?,
            directory: directory.to_owned(),
            program: program.to_owned(),
            services: Vec::new(),
            daemons: Vec::new(),
        };
        let bin = directory.join("bin");
        fs::create_dir_all(&bin).map_err(system("make a directory"))?;
        std::os::unix::fs::symlink(&clinic.program, bin.join("mmproxyctl"))
            .map_err(system("link the program"))?;
        fs::create_dir_all(clinic.config()).map_err(system("make a directory"))?;
        for (name, text) in FILES {
            fs::write(clinic.config().join(name), text).map_err(system("write a file"))?;
        }
        clinic.run(CABLES)?;
        for address in ["127.0.0.1", "::1"] {
            clinic.serve_both(address, 0, |clinic| &clinic.wks01)?;
        }
        for address in ["10.0.0.2", "fd00::2"] {
            clinic.serve_both(address, 1, |clinic| &clinic.wks01)?;
        }
        for address in ["172.20.0.2", "fd00:20::2"] {
            clinic.serve_both(address, 0, |clinic| &clinic.container)?;
        }
        clinic.serve_both("::", 0, |clinic| &clinic.routed)?;
        Ok(clinic)
    }

    /// The configuration directory.
    pub fn config(&self) -> PathBuf {
        self.directory.join("etc")
    }

    /// The host that all is about.
    pub fn host(&self) -> &Namespace {
        &self.wks01
    }

    fn serve_both(
        &mut self,
        address: &str,
        further: u16,
        on: fn(&Self) -> &Namespace,
    ) -> Result<(), Error> {
        for (udp, port) in [(false, PORTS.0), (true, PORTS.1)] {
            let address = match address.parse() {
                Ok(ip) => SocketAddr::new(ip, port + further),
                Err(error) => return Err(system("read an address")(io::Error::other(error))),
            };
            let service = on(self).enter(|| bind(udp, address))??;
            self.services.push(service);
        }
        Ok(())
    }

    /// Starts a service on wks01 and leaves it running.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub fn start(&mut self, udp: bool, address: SocketAddr) -> Result<(), Error> {
        let service = self.wks01.enter(|| bind(udp, address))??;
        self.services.push(service);
        Ok(())
    }

    /// Stops a service, wherever it is.
    pub fn stop(&mut self, udp: bool, address: SocketAddr) {
        self.services
            .retain(|service| (service.udp, service.address) != (udp, address));
    }

    /// Puts the pathways in place, and then breaks something.
    ///
    /// # Errors
    /// When a command fails that is to succeed.
    pub fn fall_ill(&mut self, ill: &Ill) -> Result<(), Error> {
        self.run(&ill.before)?;
        self.run("mmproxyctl -q pathway add --all")?;
        for service in &ill.without {
            self.stop(service.udp, service.socket()?);
        }
        for service in &ill.with {
            self.start(service.udp, service.socket()?)?;
        }
        for daemon in &ill.daemons {
            self.daemon(daemon)?;
        }
        self.run(&ill.inject)?;
        Ok(())
    }

    /// Mends what was broken: with the commands that were printed, each for this host or for that address,
    /// or as it was advised.
    ///
    /// # Errors
    /// When a command fails.
    pub fn mend(&mut self, ill: &Ill, printed: &[(Option<IpAddr>, &str)]) -> Result<(), Error> {
        match &ill.remedy {
            Remedy::AskAgain => {}
            Remedy::Advised(script) => drop(self.run(script)?),
            Remedy::Start(service) => self.start(service.udp, service.socket()?)?,
            Remedy::Printed => {
                for (on, command) in printed {
                    match on {
                        None => self.run(command)?,
                        Some(_) => self.run_on_routed(command)?,
                    };
                }
            }
        }
        Ok(())
    }

    /// A shell on a host, with the program in PATH and the clinic's files and runtime directory.
    fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("sh");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut paths = vec![self.directory.join("bin")];
        paths.extend(std::env::split_paths(&path));
        paths.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
        command
            .arg("-c")
            .arg(format!("{PRELUDE}{script}"))
            .env("PATH", std::env::join_paths(paths).unwrap_or(path))
            .env("MMPROXY_CONFIG_DIR", self.config())
            .env("RUNTIME_DIRECTORY", self.directory.join("run"))
            .env_remove("ALLOW_LIST_PATH")
            .env("DIR", &self.directory)
            .env("LAN", self.lan.path())
            .env("CONTAINER", self.container.path())
            .env("ROUTED", self.routed.path())
            .stdin(Stdio::null());
        command
    }

    /// What a script on wks01 writes, and how it ends.
    ///
    /// # Errors
    /// When there is no shell.
    pub fn output(&self, script: &str) -> Result<Output, Error> {
        let mut shell = self.shell(script);
        self.wks01
            .enter(|| shell.output())?
            .map_err(system("run sh"))
    }

    fn done(command: &str, output: Output) -> Result<String, Error> {
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = [output.stdout, output.stderr].concat();
        Err(Error::Failed {
            command: command.to_owned(),
            status: output.status.to_string(),
            said: String::from_utf8_lossy(&said).trim().to_owned(),
        })
    }

    /// Runs a script on wks01, which must succeed.
    ///
    /// # Errors
    /// With what it wrote, when it does not.
    pub fn run(&self, script: &str) -> Result<String, Error> {
        Self::done(script, self.output(script)?)
    }

    /// The same on the host behind the second cable.
    ///
    /// # Errors
    /// As [`Clinic::run`].
    pub fn run_on_routed(&self, script: &str) -> Result<String, Error> {
        let mut shell = self.shell(script);
        let output = self.routed.enter(|| shell.output())?;
        Self::done(script, output.map_err(system("run sh"))?)
    }

    /// Starts a script on wks01 that goes on until the clinic ends.
    ///
    /// # Errors
    /// When there is no shell.
    pub fn daemon(&mut self, script: &str) -> Result<(), Error> {
        let log = fs::File::create(
            self.directory
                .join(format!("daemon-{}.log", self.daemons.len())),
        )
        .map_err(system("write a log"))?;
        let mut shell = self.shell(script);
        shell.stdout(Stdio::null()).stderr(log).process_group(0);
        let child = self
            .wks01
            .enter(|| shell.spawn())?
            .map_err(system("run sh"))?;
        self.daemons.push(child);
        Ok(())
    }
}

impl Drop for Clinic {
    fn drop(&mut self) {
        for child in &mut self.daemons {
            // its programs, too; gone already is as good
            let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
            let _ = child.wait();
        }
    }
}

fn bind(udp: bool, address: SocketAddr) -> Result<Service, Error> {
    let end = Instant::now() + LET_GO;
    let bound = loop {
        let bound = if udp {
            UdpSocket::bind(address).map(OwnedFd::from)
        } else {
            TcpListener::bind(address).map(OwnedFd::from)
        };
        match bound {
            // a child that is just being forked holds what was open until it executes its program
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            bound => break bound,
        }
    };
    Ok(Service {
        udp,
        address,
        _socket: bound.map_err(system(format!("start a service at {address}")))?,
    })
}
