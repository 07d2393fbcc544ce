package qcow2

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// halfRandom is content that compresses to about half.
func halfRandom(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		if i%1024 < 512 {
			b[i] = byte(r.Uint32())
		} else {
			b[i] = "the quick brown fox "[i%20]
		}
	}
	return b
}

// packedAs returns src as one compressed cluster of each type.
func packedAs(t testing.TB, src []byte) map[CompressionType][]byte {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	var deflated bytes.Buffer
	w, err := flate.NewWriter(&deflated, 6)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write(src)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return map[CompressionType][]byte{Zstd: enc.EncodeAll(src, nil), Deflate: deflated.Bytes()}
}

// A part of a cluster is what the whole has there; one that reaches behind what
// a stream holds is an error.
func TestPart(t *testing.T) {
	const size = 64 << 10
	src := halfRandom(size)
	r := rand.New(rand.NewPCG(5, 6))
	for typ, b := range packedAs(t, src) {
		var u unpacker
		for range 200 {
			within := r.IntN(size)
			dst := make([]byte, r.IntN(size-within+1))
			if err := u.part(typ, b, size, within, dst); err != nil || !bytes.Equal(dst, src[within:][:len(dst)]) {
				t.Fatalf("%v: %d bytes at %d: %v", typ, len(dst), within, err)
			}
		}
		if err := u.part(typ, b[:len(b)/2], size, size-512, make([]byte, 512)); err == nil {
			t.Errorf("%v: the end of half a stream", typ)
		}
	}
}

// BenchmarkUnpackCluster decodes clusters of 64 KiB.
func BenchmarkUnpackCluster(b *testing.B) {
	src := halfRandom(64 << 10)
	for typ, packed := range packedAs(b, src) {
		b.Run(typ.String(), func(b *testing.B) {
			var u unpacker
			dst := make([]byte, len(src))
			b.ReportAllocs()
			b.SetBytes(int64(len(dst)))
			for b.Loop() {
				if err := u.unpack(typ, packed, dst); err != nil {
					b.Fatal(err)
				}
			}
			if !bytes.Equal(dst, src) {
				b.Fatal("other bytes")
			}
		})
	}
}

// A zstd frame decoded in memory is what its stream is, also when other bytes
// follow it, it ends early, or it is damaged.
func TestFrameEqualsStream(t *testing.T) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(true))
	if err != nil {
		t.Fatal(err)
	}
	src := halfRandom(64 << 10)
	frame := enc.EncodeAll(src, nil)
	small := enc.EncodeAll(src[:1000], nil)
	runs := enc.EncodeAll(bytes.Repeat([]byte{7}, len(src)), nil)
	cases := [][]byte{
		nil, frame, runs, small, frame[:len(frame)-1], frame[:len(frame)/2], frame[:3],
		append(bytes.Clone(frame), 0, 0, 0, 0, 0), append(bytes.Clone(frame), frame[:300]...),
		append(bytes.Clone(small), frame...), enc.EncodeAll(append(bytes.Clone(src), 1, 2, 3), nil),
	}
	r := rand.New(rand.NewPCG(3, 4))
	for range 500 {
		b := bytes.Clone(frame)
		b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		cases = append(cases, b)
	}
	inMemory := 0
	for i, c := range cases {
		var u unpacker
		got, want := make([]byte, len(src)), make([]byte, len(src))
		gotErr, wantErr := u.unpack(Zstd, c, got), u.stream(Zstd, c, want)
		if (gotErr == nil) != (wantErr == nil) || gotErr == nil && !bytes.Equal(got, want) {
			t.Errorf("case %d: %v, and %v of the stream; equal: %v", i, gotErr, wantErr, bytes.Equal(got, want))
		}
		if u.frame(c, got) {
			inMemory++
		}
	}
	if inMemory < 4 {
		t.Errorf("only %d frames were decoded in memory", inMemory)
	}
}
