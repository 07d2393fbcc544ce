package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs"
)

// A server that is isolated can neither mount nor unmount, nor reach devices.
// Before it gives up its rights it starts a keeper: the same program, which
// never sees a byte of the image, waits on a socket and does the few things
// that place can, for one directory that was settled before. A server that an
// image has taken over can ask it for no more than that. The keeper ends when
// the server does, in whatever way.

// keeperEnv names the descriptor of the socket in the keeper's environment.
const keeperEnv = "IMAGESTACK_KEEPER_FD"

// maxMessage bounds a message between the two, in bytes.
const maxMessage = 64 << 10

// What the server asks for.
type request string

const (
	askAttach request = "attach" // mount; the connection comes with the answer
	// askBacking registers the file that came with askAttach as the one that
	// is the disk.
	askBacking request = "backing"
	askProbe   request = "probe"
	askLoop    request = "loop"
	askLeave   request = "leave"
)

type answer struct {
	Error    string   `json:",omitempty"`
	Loop     string   `json:",omitempty"`
	Backing  int32    `json:",omitempty"`
	Lazy     bool     `json:",omitempty"`
	Troubles []string `json:",omitempty"`
}

// keeper is the server's side.
type keeper struct{ socket int }

// startKeeper starts a keeper for the place.
func startKeeper(p *place) (*keeper, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "keeper")
	defer theirs.Close()
	k := &keeper{pair[0]}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{os.Args[0], "(keeper)", p.Dir} // for who lists processes
	cmd.Env = append(os.Environ(), keeperEnv+"=3")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Dir = "/"
	err = cmd.Start()
	if err == nil {
		err = errors.Join(k.send(p, -1), cmd.Process.Release())
	}
	if err != nil {
		k.close()
		return nil, fmt.Errorf("starting the keeper: %w", err)
	}
	return k, nil
}

func (k *keeper) close() { _ = unix.Close(k.socket) }

// send sends v, and with it the descriptor fd when that is not -1. (Sending
// descriptors is refused once the server is sealed, and so is sendmsg.)
func (k *keeper) send(v any, fd int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if fd >= 0 {
		return unix.Sendmsg(k.socket, b, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL)
	}
	_, err = unix.Write(k.socket, b)
	return err
}

// ask asks without a descriptor.
func (k *keeper) ask(r request) (answer, error) {
	a, _, err := k.askWith(r, -1)
	return a, err
}

// askWith sends the descriptor with along, if it is not -1, and waits for the
// answer, and for the descriptor that comes with that to attach.
func (k *keeper) askWith(r request, with int) (a answer, fd int, err error) {
	if err := k.send(r, with); err != nil {
		return a, -1, fmt.Errorf("asking the keeper: %w", err)
	}
	buf := make([]byte, maxMessage)
	var n int
	fd = -1
	if r == askAttach {
		n, fd, err = receive(k.socket, buf)
	} else {
		// Receiving descriptors is refused by now.
		n, err = retry(func() (int, error) { return unix.Read(k.socket, buf) })
	}
	if err == nil && n == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		err = json.Unmarshal(buf[:n], &a)
	}
	if err != nil {
		return a, fd, fmt.Errorf("asking the keeper: %w", err)
	}
	if a.Error != "" {
		return a, fd, errors.New(a.Error)
	}
	return a, fd, nil
}

func retry(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// receive reads a message and the descriptor that comes with it, -1 for none.
func receive(socket int, buf []byte) (n, fd int, err error) {
	oob := make([]byte, unix.CmsgSpace(4))
	var oobn int
	n, err = retry(func() (n int, err error) {
		n, oobn, _, _, err = unix.Recvmsg(socket, buf, oob, unix.MSG_CMSG_CLOEXEC)
		return n, err
	})
	if err != nil || oobn == 0 {
		return n, -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return n, -1, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return n, -1, err
	}
	return n, fds[0], nil
}

// beKeeper does the keeper's work when this process is one, and reports
// whether it was.
func beKeeper() bool {
	socket, err := strconv.Atoi(os.Getenv(keeperEnv))
	if err != nil || socket < 3 {
		return false
	}
	_ = os.Unsetenv(keeperEnv)
	unix.CloseOnExec(socket)
	// Best effort: the name would be that of the link it was started through.
	_ = os.WriteFile("/proc/self/comm", []byte("mount-keeper"), 0)
	// The server decides when the end has come.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	buf := make([]byte, maxMessage)
	var p place
	var disk int // the descriptor that came with the last message, -1 for none
	next := func(v any) bool {
		var n int
		var err error
		n, disk, err = receive(socket, buf)
		return err == nil && n > 0 && json.Unmarshal(buf[:n], v) == nil
	}
	if !next(&p) {
		return true
	}
	var r request
	for next(&r) {
		a, conn := p.serve(r, disk)
		b, err := json.Marshal(a)
		if err != nil {
			return true
		}
		var rights []byte
		if conn >= 0 {
			rights = unix.UnixRights(conn)
		}
		err = unix.Sendmsg(socket, b, rights, nil, unix.MSG_NOSIGNAL)
		if conn < 0 || !p.keep(conn, disk) {
			// The connection must end with the server.
			for _, fd := range []int{conn, disk} {
				if fd >= 0 {
					_ = unix.Close(fd)
				}
			}
		}
		if err != nil {
			return true
		}
	}
	return true
}

// keep holds on to the connection and to the file that is the disk until the
// server asks for askBacking, if such a file came, and reports whether it did.
func (p *place) keep(conn, disk int) bool {
	if disk < 0 || p.backing != nil {
		return false
	}
	p.backing = &backing{conn: conn, disk: disk}
	return true
}

// serve does what the server asks for. A connection is -1 for none, and so is
// the file that came with the request.
func (p *place) serve(r request, disk int) (a answer, conn int) {
	conn = -1
	var err error
	switch r {
	case askAttach:
		conn, err = fusefs.Attach(p.Dir, p.ReadOnly, p.options())
	case askBacking:
		a.Backing, err = p.registerBacking()
	case askProbe:
		err = p.probe()
	case askLoop:
		a.Loop, err = p.attachLoop()
	case askLeave:
		var troubles []error
		a.Lazy, troubles = p.leave()
		for _, t := range troubles {
			a.Troubles = append(a.Troubles, t.Error())
		}
	default:
		err = fmt.Errorf("what is %q?", r)
	}
	if err != nil {
		a.Error = err.Error()
	}
	return a, conn
}
