package uring

import "encoding/binary"

// Where things are in what the kernel and the server share for one request
// (struct fuse_uring_req_header and those in it, linux/fuse.h of 7.42): the
// header of every FUSE request or reply, that of its operation, and what
// concerns the ring. Further arguments, and all results, are in the payload.
const (
	headerSize = 288
	atOp       = 128 // first argument of the operation
	opSize     = 128
	atRing     = 256 // struct fuse_uring_ent_in_out
	atCommit   = atRing + 8
	atPayload  = atRing + 16

	inHeaderSize  = 40 // struct fuse_in_header
	outHeaderSize = 16 // struct fuse_out_header

	cmdRegister = 1
	cmdCommit   = 2
)

// Request is one request of the kernel, and its reply.
type Request struct {
	header  []byte // headerSize
	payload []byte
}

// Opcode of the request, as FUSE numbers them.
func (r *Request) Opcode() uint32 { return binary.NativeEndian.Uint32(r.header[4:]) }

// Node is the inode that it is about.
func (r *Request) Node() uint64 { return binary.NativeEndian.Uint64(r.header[16:]) }

// Header is the struct fuse_in_header of the request.
func (r *Request) Header() []byte { return r.header[:inHeaderSize] }

// Op is the first argument of the operation: 128 bytes, of which those behind
// the argument mean nothing.
func (r *Request) Op() []byte { return r.header[atOp : atOp+opSize] }

// OpLen is how long the first argument really is.
func (r *Request) OpLen() int {
	n := int(binary.NativeEndian.Uint32(r.header)) - inHeaderSize - len(r.Arguments())
	return max(0, min(n, opSize))
}

// Arguments are those behind the first: names, or the data of a write.
func (r *Request) Arguments() []byte {
	n := binary.NativeEndian.Uint32(r.header[atPayload:])
	return r.payload[:min(int64(n), int64(len(r.payload)))]
}

// Results is where the results go. They may overwrite the arguments.
func (r *Request) Results() []byte { return r.payload }

// ReplyHeader is where a struct fuse_out_header goes, for those who write it
// themselves; Reply must not be called then, but Replied.
func (r *Request) ReplyHeader() []byte { return r.header[:outHeaderSize] }

// Reply makes n bytes of Results the reply, or with an errno that is not 0 an
// error.
func (r *Request) Reply(n int, errno int32) {
	// The number of the request is where that of the reply is.
	binary.NativeEndian.PutUint32(r.header[4:], uint32(-errno))
	if errno != 0 {
		n = 0
	}
	binary.NativeEndian.PutUint32(r.header, uint32(outHeaderSize+n))
	r.Replied(n)
}

// Replied says that ReplyHeader was written and n bytes of Results are the
// reply.
func (r *Request) Replied(n int) {
	binary.NativeEndian.PutUint32(r.header[atPayload:], uint32(n))
}

func (r *Request) commit() uint64 { return binary.NativeEndian.Uint64(r.header[atCommit:]) }

// command makes s a command to the FUSE device fd.
func (s submission) command(code uint32, fd int, queue uint16, commit, data uint64) {
	s.op(opURingCmd, fd, data)
	binary.NativeEndian.PutUint32(s[8:], code)
	// struct fuse_uring_cmd_req
	binary.NativeEndian.PutUint64(s[56:], commit)
	binary.NativeEndian.PutUint16(s[64:], queue)
}

// poll makes s wait for the events.
func (s submission) poll(events uint32, flags uint32) {
	binary.NativeEndian.PutUint32(s[24:], flags)
	binary.NativeEndian.PutUint32(s[28:], events)
}

// NewRequest returns a read or a write of size bytes at off, for tests; it has
// room for room bytes of data. What is written are zeros.
func NewRequest(opcode uint32, node, off uint64, size uint32, room int) *Request {
	r := &Request{header: make([]byte, headerSize), payload: make([]byte, room)}
	const opLen = 40 // of struct fuse_read_in and struct fuse_write_in
	data := uint32(0)
	if opcode == 16 {
		data = size
	}
	binary.NativeEndian.PutUint32(r.header, inHeaderSize+opLen+data)
	binary.NativeEndian.PutUint32(r.header[4:], opcode)
	binary.NativeEndian.PutUint64(r.header[16:], node)
	binary.NativeEndian.PutUint64(r.header[atOp+8:], off)
	binary.NativeEndian.PutUint32(r.header[atOp+16:], size)
	binary.NativeEndian.PutUint32(r.header[atPayload:], data)
	return r
}
