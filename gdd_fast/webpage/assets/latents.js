// The noise of a seed, as PyTorch draws it on a CPU, so that a seed names the same image here and in Python.
//
// PyTorch's generator is MT19937 (Matsumoto and Nishimura, 1998). torch.randn of at least 16 values fills them with
// uniform numbers of 24 bits and turns each 16 into normal ones by Box and Muller's formula, the first eight with the
// last eight; if the number of values is no multiple of 16, the last 16 are drawn again. torch.randint takes a whole
// 32-bit number modulo the range.

const N = 624;
const M = 397;

export class SeedStream {
  constructor(seed) {
    this.state = new Uint32Array(N);
    this.state[0] = seed >>> 0;
    for (let i = 1; i < N; i++) {
      const last = this.state[i - 1];
      this.state[i] = Math.imul(1812433253, last ^ (last >>> 30)) + i;
    }
    this.next = N;
  }

  // A whole number of 32 bits.
  bits() {
    if (this.next === N) this.#advance();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  // torch.randn(count), count >= 16.
  normal(count) {
    const x = Float32Array.from({ length: count }, () => this.#uniform());
    for (let i = 0; i + 16 <= count; i += 16) toNormal(x, i);
    if (count % 16) {
      for (let i = count - 16; i < count; i++) x[i] = this.#uniform();
      toNormal(x, count - 16);
    }
    return x;
  }

  // torch.randint(high, ())
  integer(high) {
    return this.bits() % high;
  }

  #uniform() {
    return (this.bits() & 0xffffff) / 0x1000000;
  }

  #advance() {
    const s = this.state;
    for (let i = 0; i < N; i++) {
      const y = (s[i] & 0x80000000) | (s[(i + 1) % N] & 0x7fffffff);
      s[i] = s[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }
}

function toNormal(x, start) {
  for (let i = start; i < start + 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - x[i]));
    const angle = 2 * Math.PI * x[i + 8];
    x[i] = radius * Math.cos(angle);
    x[i + 8] = radius * Math.sin(angle);
  }
}

// Along the great circle from a (t = 0) to b (t = 1). A straight line would pass nearer to zero than noise ever is.
export function between(a, b, t) {
  let aa = 0;
  let bb = 0;
  let ab = 0;
  for (let i = 0; i < a.length; i++) {
    aa += a[i] * a[i];
    bb += b[i] * b[i];
    ab += a[i] * b[i];
  }
  const angle = Math.acos(Math.min(1, Math.max(-1, ab / Math.sqrt(aa * bb))));
  const sine = Math.sin(angle);
  const [p, q] = sine > 1e-6 ? [Math.sin((1 - t) * angle) / sine, Math.sin(t * angle) / sine] : [1 - t, t];
  return a.map((value, i) => p * value + q * b[i]);
}
