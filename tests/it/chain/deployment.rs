//! The deployment of `config/*.example` as namespaces: client, vps01, router01, wks01, and the programs
//! of each, started on the shipped files as they stand.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::support::net::{Host, Running, wait_for};

pub(crate) const CLIENT4: &str = "203.0.113.7";
pub(crate) const CLIENT6: &str = "2001:db8:7::7";
/// vps01, as the internet sees it.
pub(crate) const VPS01: [&str; 2] = ["192.0.2.5", "2001:db8:5::5"];
/// router01, as the internet sees it.
pub(crate) const ROUTER01: [&str; 2] = ["192.0.2.6", "2001:db8:6::6"];
/// The clients, in the order of [`VPS01`].
pub(crate) const CLIENT: [&str; 2] = [CLIENT4, CLIENT6];
pub(crate) const VPS01_PRIVATE: &str = "100.103.104.105";
const ROUTER01_PRIVATE: &str = "100.103.104.106";
pub(crate) const WKS01_PRIVATE: &str = "100.101.102.123";

/// A file of this repository.
pub(crate) fn shipped(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Four hosts: the client reaches both proxies by IPv4 and IPv6, the proxies reach wks01 by IPv4 only,
/// and wks01 has a default route, so that a reply without a pathway leaves by it.
pub(crate) struct Deployment {
    pub(crate) client: Host,
    pub(crate) vps01: Host,
    pub(crate) router01: Host,
    pub(crate) wks01: Host,
}

impl Deployment {
    /// The hosts, and the shipped example files as the configuration of wks01.
    pub(crate) fn new() -> Self {
        let new = Self {
            client: Host::new("client"),
            vps01: Host::new("vps01"),
            router01: Host::new("router01"),
            wks01: Host::new("wks01"),
        };
        cable(&new.client, "vps01", &CLIENT, &new.vps01, "public", &VPS01);
        cable(
            &new.client,
            "router01",
            &CLIENT,
            &new.router01,
            "public",
            &ROUTER01,
        );
        for (proxy, name, address) in [
            (&new.vps01, "vps01", VPS01_PRIVATE),
            (&new.router01, "router01", ROUTER01_PRIVATE),
        ] {
            cable(
                &new.wks01,
                name,
                &[WKS01_PRIVATE],
                proxy,
                "wks01",
                &[address],
            );
        }
        new.wks01.ip("route add default dev vps01");
        new.wks01.ip("-6 route add default dev vps01");
        for file in ["pathways.conf", "instances.tsv", "allow.txt"] {
            let text = std::fs::read(shipped(&format!("config/{file}.example"))).expect(file);
            new.wks01.write(&format!("etc/{file}"), text);
        }
        new
    }

    /// Installs the pathways, runs these instances, and waits for them to listen.
    pub(crate) fn mmproxyctl(&self, instances: &[(&str, u16)]) -> Vec<Running> {
        let added = self
            .wks01
            .mmproxyctl("pathway add-all")
            .output()
            .expect("mmproxyctl");
        assert!(
            added.status.success(),
            "{}",
            String::from_utf8_lossy(&added.stderr)
        );
        instances
            .iter()
            .map(|(name, port)| {
                let command = self.wks01.mmproxyctl(&format!("run {name}"));
                let relay = self.wks01.spawn(command);
                self.wks01.wait_listening(*port);
                relay
            })
            .collect()
    }

    /// HAProxy on vps01 and router01, on the shipped configurations.
    pub(crate) fn haproxies(&self) -> [Running; 2] {
        [
            (&self.vps01, "examples/vps01-haproxy/haproxy.cfg"),
            (&self.router01, "examples/router01-openwrt/haproxy.cfg"),
        ]
        .map(|(host, file)| {
            let mut command = host.command("haproxy");
            command.arg("-db").arg("-f").arg(shipped(file));
            let running = host.spawn(command);
            host.wait_listening(22001);
            running
        })
    }

    /// nginx as the proxy on vps01, on the shipped configuration.
    pub(crate) fn nginx_stream(&self) -> Running {
        // its pid file and error log are where nginx.conf puts them, on file systems of its own
        let script = "mount -t tmpfs none /run; mount -t tmpfs none /var/log/nginx
            exec nginx -e stderr -c \"$0\" -g 'daemon off;'";
        let file = shipped("examples/nginx-stream/nginx.conf");
        let running = self
            .vps01
            .spawn(private_mounts(&self.vps01, script, &[&file]));
        self.vps01.wait_listening(22001);
        running
    }

    /// sshd on port 22 of wks01, and the key that it takes.
    pub(crate) fn sshd(&self) -> Sshd {
        let dir = self.wks01.dir();
        for key in ["hostkey", "key"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(dir.join(key))
                .status()
                .expect("ssh-keygen: install it (./tests/run.sh does)");
            assert!(made.success(), "ssh-keygen: {made}");
        }
        let config = self.wks01.write(
            "sshd_config",
            format!(
                "HostKey {0}/hostkey\nAuthorizedKeysFile {0}/key.pub\nPidFile none\nUsePAM no\n\
                 StrictModes no\nPermitRootLogin prohibit-password\n",
                dir.display()
            ),
        );
        // sshd wants its directory under /run; and where root's password is locked with "!", it takes
        // no key either unless PAM is on
        let script = "mount -t tmpfs -o mode=755 none /run; mkdir /run/sshd
            (umask 077; sed 's/^root:[^:]*:/root:*:/' /etc/shadow >/run/shadow)
            mount --bind /run/shadow /etc/shadow
            exec /usr/sbin/sshd -D -e -f \"$0\"";
        let running = self
            .wks01
            .spawn(private_mounts(&self.wks01, script, &[&config]));
        self.wks01.wait_listening(22);
        Sshd {
            running,
            key: dir.join("key"),
        }
    }

    /// nginx as the web server on port 443 of wks01, which logs and answers `ADDRESS PORT` of its client.
    pub(crate) fn web_server(&self) -> WebServer {
        let log = self.wks01.dir().join("access.log");
        let config = self.wks01.write(
            "nginx.conf",
            format!(
                "user root; pid {0}/nginx.pid; error_log stderr; events {{}}\n\
                 http {{ log_format client '$remote_addr $remote_port'; access_log {1} client;\n\
                 server {{ listen 0.0.0.0:443; listen [::]:443 ipv6only=on;\n\
                 location / {{ return 200 '$remote_addr $remote_port'; }} }} }}\n",
                self.wks01.dir().display(),
                log.display()
            ),
        );
        let mut command = self.wks01.command("nginx");
        command
            .args(["-e", "stderr", "-g", "daemon off;", "-c"])
            .arg(config);
        let running = self.wks01.spawn(command);
        self.wks01.wait_listening(443);
        WebServer {
            _running: running,
            log,
        }
    }

    /// Fetches from the web server through vps01, returns what it answered.
    pub(crate) fn fetch(&self, address: &str, source_port: u16) -> String {
        let host = host_of(address);
        self.client.run(&format!(
            "curl --silent --show-error --max-time 10 --local-port {source_port} http://{host}:443/"
        ))
    }
}

/// An address as it stands before a port.
fn host_of(address: &str) -> String {
    if address.contains(':') {
        format!("[{address}]")
    } else {
        address.to_owned()
    }
}

/// A veth pair whose ends have host addresses and a route to the other end's, one per family.
fn cable(
    left: &Host,
    left_interface: &str,
    left_addresses: &[&str],
    right: &Host,
    right_interface: &str,
    right_addresses: &[&str],
) {
    let with_length = |address: &&str| {
        let length = if address.contains(':') { 128 } else { 32 };
        format!("{address}/{length}")
    };
    let own: Vec<String> = left_addresses.iter().map(with_length).collect();
    let other: Vec<String> = right_addresses.iter().map(with_length).collect();
    left.link(
        left_interface,
        &own.iter().map(String::as_str).collect::<Vec<_>>(),
        right,
        right_interface,
        &other.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    for (l, r) in left_addresses.iter().zip(right_addresses) {
        left.ip(&format!("route add {r} dev {left_interface} src {l}"));
        right.ip(&format!("route add {l} dev {right_interface} src {r}"));
    }
}

/// A shell script in a mount namespace of its own: what it mounts, only it and its children see.
fn private_mounts(host: &Host, script: &str, arguments: &[&Path]) -> Command {
    let mut command = host.command("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-euc", script])
        .args(arguments);
    command
}

/// A real sshd; its log is what these tests are about.
pub(crate) struct Sshd {
    running: Running,
    key: PathBuf,
}

impl Sshd {
    /// Waits for the line that says from where root logged in.
    pub(crate) fn wait_login(&self, address: &str, port: u16) {
        self.running.wait_log(&format!(
            "Accepted publickey for root from {address} port {port} "
        ));
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        self.running.log()
    }

    /// Logs in from `host` (its address and port, where given) and waits for the remote command.
    pub(crate) fn login(
        &self,
        host: &Host,
        address: &str,
        port: u16,
        from: Option<(&str, u16)>,
    ) -> Session {
        let mut command = host.command("ssh");
        command
            .args(["-F", "none", "-i"])
            .arg(&self.key)
            .args(["-p", &port.to_string()]);
        for option in [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "BatchMode=yes",
            "ConnectTimeout=10",
        ] {
            command.args(["-o", option]);
        }
        if let Some((source, source_port)) = from {
            // reuseaddr: two connections from one address and port at a time, as a NAT makes them
            let (to, source) = (host_of(address), host_of(source));
            command.args([
                "-o",
                &format!(
                    "ProxyCommand=socat - TCP:{to}:{port},bind={source}:{source_port},reuseaddr"
                ),
            ]);
        }
        let mut child = command
            .arg(format!("root@{address}"))
            .arg("echo $SSH_CONNECTION; exec cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("ssh: install it (./tests/run.sh does)");
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut session = Session {
            child,
            input,
            output: BufReader::new(output.expect("stdout is piped")),
            client: (String::new(), 0),
        };
        let line = session.line();
        let mut words = line.split(' ');
        let address = words.next().unwrap_or_default().to_owned();
        let port = words.next().and_then(|port| port.parse().ok());
        session.client = (
            address,
            port.unwrap_or_else(|| panic!("no login: '{line}'\n{}", self.log())),
        );
        session
    }
}

/// A login that is open until dropped, with `cat` at its far end.
pub(crate) struct Session {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// The client's address and port as the service sees them (`$SSH_CONNECTION`).
    pub(crate) client: (String, u16),
}

impl Session {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("read from ssh");
        line.trim_end().to_owned()
    }

    /// Sends a line there and back.
    pub(crate) fn echo(&mut self, text: &str) {
        let input = self.input.as_mut().expect("open until closed");
        writeln!(input, "{text}").expect("write to ssh");
        assert_eq!(self.line(), text);
    }

    /// Ends the input; `cat`, sshd and ssh then end by themselves.
    pub(crate) fn close(mut self) {
        drop(self.input.take());
        let status = self.child.wait().expect("wait for ssh");
        assert!(status.success(), "ssh: {status}");
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A real nginx.
pub(crate) struct WebServer {
    _running: Running,
    log: PathBuf,
}

impl WebServer {
    /// Waits for the access log's line about a client.
    pub(crate) fn wait_logged(&self, address: &str, port: u16) {
        let line = format!("{address} {port}");
        let log = || std::fs::read_to_string(&self.log).unwrap_or_default();
        wait_for(&format!("'{line}' in nginx's access log"), || {
            log().lines().any(|logged| logged == line)
        });
    }
}
