// Package keeper gives a process that is about to parse an image, and to give
// up its rights for that, a second process that does not: the keeper does the
// few things that take rights, for one place that was settled before.
//
// Design note. The keeper is the same program, started anew before a byte of
// an image was read. It never sees one. It waits on a socket (SOCK_SEQPACKET,
// a message is one JSON value, at most one descriptor comes with it) for
// requests that the tool defines, and ends when the other process does, in
// whatever way. What it is told once, at the start, by a process that nobody
// has taken over yet (the setup), bounds what any request can lead to: a
// request chooses among prepared acts and never brings a path or a command.
//
// While the keeper works on a request, the other process may cancel it; so
// does its end.
package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Env names the descriptor of the socket in the keeper's environment. A test
// binary in whose environment it is set has to be the tool and not to run its
// tests, which would start keepers of their own.
const Env = "IMAGESTACK_KEEPER_FD"

// maxMessage bounds a message between the two, in bytes. It fits the buffer
// that every socket has.
const maxMessage = 160 << 10

// cancelled is what is sent instead of a request to end the one at work.
const cancelled = `"(cancel)"`

// reply is how an answer travels.
type reply struct {
	Error  string          `json:",omitempty"`
	Answer json.RawMessage `json:",omitempty"`
}

// Keeper is the side of the process that parses. Its methods may be called
// concurrently; one request is at work at a time.
type Keeper struct {
	mu     sync.Mutex
	socket int
	buf    []byte
}

// Options of Start.
type Options struct {
	Title string // shown by ps after "(keeper)"
	// Stderr is the keeper's, nil for none.
	Stderr *os.File
	// Here keeps the working directory; else it is /, so as not to be busy.
	Here bool
	// Files are passed on, as descriptors 4, 5, ….
	Files []*os.File
}

// Start starts a keeper with the setup, which travels as JSON.
func Start(setup any, o Options) (*Keeper, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "keeper")
	defer theirs.Close()
	k := &Keeper{socket: pair[0], buf: make([]byte, maxMessage)}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{os.Args[0], "(keeper)", o.Title} // for who lists processes
	cmd.Env = append(os.Environ(), Env+"=3")
	cmd.ExtraFiles = append([]*os.File{theirs}, o.Files...)
	if o.Stderr != nil {
		cmd.Stderr = o.Stderr
	}
	if !o.Here {
		cmd.Dir = "/"
	}
	err = cmd.Start()
	if err == nil {
		err = errors.Join(k.send(setup, -1), cmd.Process.Release())
	}
	if err != nil {
		k.Close()
		return nil, fmt.Errorf("starting the keeper: %w", err)
	}
	return k, nil
}

// Close ends the keeper; what it does then is its own matter.
func (k *Keeper) Close() { _ = unix.Close(k.socket) }

// send sends v, and fd with it when that is not -1. Without one it uses
// nothing that sandbox.Seal refuses.
func (k *Keeper) send(v any, fd int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("a message of %d bytes: %w", len(b), unix.EMSGSIZE)
	}
	if fd >= 0 {
		return unix.Sendmsg(k.socket, b, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL)
	}
	_, err = retry(func() (int, error) { return unix.Write(k.socket, b) })
	return err
}

// Ask sends a request and waits for its answer, which it decodes into answer
// (nil for none). When ctx ends, the keeper is told to give up, and its answer
// is still waited for. Errors of the keeper come as their text.
func (k *Keeper) Ask(ctx context.Context, request, answer any) error {
	_, err := k.ask(ctx, request, answer, -1, false)
	return err
}

// AskFile is Ask with a descriptor sent along (-1 for none) and one that comes
// back, the caller's then, -1 for none. It is not for a process that was
// sealed.
func (k *Keeper) AskFile(ctx context.Context, request, answer any, with int) (fd int, err error) {
	return k.ask(ctx, request, answer, with, true)
}

func (k *Keeper) ask(ctx context.Context, request, answer any, with int, file bool) (fd int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	fd = -1
	fail := func(err error) (int, error) {
		if fd >= 0 {
			_ = unix.Close(fd) // of no use any more
		}
		return -1, fmt.Errorf("asking the keeper: %w", err)
	}
	if err := k.send(request, with); err != nil {
		return fail(err)
	}
	told := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(told)
		_, _ = unix.Write(k.socket, []byte(cancelled)) // it may have gone: seen below
	})
	var n int
	if file {
		n, fd, err = receive(k.socket, k.buf)
	} else {
		n, err = retry(func() (int, error) { return unix.Read(k.socket, k.buf) })
	}
	if !stop() {
		<-told // it must not come after the next request
	}
	if err == nil && n == 0 {
		err = io.ErrUnexpectedEOF
	}
	var r reply
	if err == nil {
		err = json.Unmarshal(k.buf[:n], &r)
	}
	if err == nil && r.Error == "" && answer != nil {
		err = json.Unmarshal(r.Answer, answer)
	}
	if err != nil {
		return fail(err)
	}
	if r.Error != "" {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return -1, errors.New(r.Error)
	}
	return fd, nil
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

// Given is what came with a request.
type Given struct {
	FD int // a descriptor, -1 for none; closed after the request, see Reply.Keep
}

// Reply is the answer to a request.
type Reply struct {
	Answer any
	FD     int // goes along and is closed then, see Keep; -1 for none
	// Keep leaves both descriptors open: the service goes on using them.
	Keep bool
	Err  error
}

// Service does what the process that parses asks for.
type Service interface {
	// Serve does one request, a JSON value. ctx ends when the other process
	// cancels it or is gone.
	Serve(ctx context.Context, request json.RawMessage, given Given) Reply
	// End is called when the other process is gone.
	End()
}

// Wanted reports whether this process was started to be a keeper.
func Wanted() bool { return os.Getenv(Env) != "" }

// Be does the keeper's work when this process is one, and reports whether it
// was. The service is made from the setup.
func Be(name string, newService func(setup json.RawMessage) (Service, error)) bool {
	if !Wanted() {
		return false
	}
	socket, err := strconv.Atoi(os.Getenv(Env))
	_ = os.Unsetenv(Env)
	if err != nil || socket < 3 {
		return true
	}
	unix.CloseOnExec(socket)
	// Best effort: the name would be that of the link it was started through.
	_ = os.WriteFile("/proc/self/comm", []byte(name), 0)
	// The other process decides when the end has come. (Not ignored: programs
	// that are started would ignore them, too.)
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	serve(socket, newService)
	return true
}

func serve(socket int, newService func(json.RawMessage) (Service, error)) {
	defer func() { _ = unix.Close(socket) }()
	buf := make([]byte, maxMessage)
	next := func() (json.RawMessage, int) {
		for {
			n, fd, err := receive(socket, buf)
			if err != nil || n == 0 {
				return nil, -1
			}
			if string(buf[:n]) != cancelled { // else it came too late
				return append(json.RawMessage(nil), buf[:n]...), fd
			}
		}
	}
	setup, _ := next()
	if setup == nil {
		return
	}
	s, setupErr := newService(setup)
	if setupErr == nil {
		defer s.End()
	}
	for {
		request, fd := next()
		if request == nil {
			return
		}
		r := Reply{FD: -1, Err: setupErr}
		if setupErr == nil {
			ctx, done := watch(socket)
			r = s.Serve(ctx, request, Given{fd})
			done()
		}
		err := answer(socket, r)
		if !r.Keep {
			for _, fd := range []int{fd, r.FD} {
				if fd >= 0 {
					_ = unix.Close(fd)
				}
			}
		}
		if err != nil {
			return
		}
	}
}

func answer(socket int, r Reply) error {
	var m reply
	var err error
	if r.Err != nil {
		m.Error = r.Err.Error()
	} else if m.Answer, err = json.Marshal(r.Answer); err != nil {
		return err
	}
	b, err := json.Marshal(m)
	if err == nil && len(b) > maxMessage {
		b, err = json.Marshal(reply{Error: "the keeper's answer is too long"})
	}
	if err != nil {
		return err
	}
	var rights []byte
	if r.FD >= 0 {
		rights = unix.UnixRights(r.FD)
	}
	return unix.Sendmsg(socket, b, rights, nil, unix.MSG_NOSIGNAL)
}

// watch gives a context that ends when something comes in over the socket: a
// request that is at work is followed by nothing but its cancellation or the
// end. done has to be called before the socket is read again.
func watch(socket int) (ctx context.Context, done func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return ctx, cancel // not to be cancelled, then
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		fds := []unix.PollFd{{Fd: int32(socket), Events: unix.POLLIN}, {Fd: int32(pipe[0]), Events: unix.POLLIN}}
		_, err := retry(func() (int, error) { return unix.Poll(fds, -1) })
		if err == nil && fds[0].Revents != 0 {
			cancel()
		}
	})
	return ctx, func() {
		_ = unix.Close(pipe[1]) // wakes it up
		wg.Wait()
		_ = unix.Close(pipe[0])
		cancel()
	}
}
